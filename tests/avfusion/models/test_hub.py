"""Models as folders, and on the Hub."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from avfusion import CheckpointError, DeepAVFusion, EncoderConfig, load_encoder, save_encoder

CONFIG = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 48), audio_size=(32, 64), fusion="dense")


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = DeepAVFusion(CONFIG)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def assert_same(model, other):
    assert other.config == model.config
    assert not other.training
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_saved_model_comes_back(saved):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for other in (DeepAVFusion.from_pretrained(folder), load_encoder(folder), load_encoder(str(folder))):
        assert_same(model, other)
    assert EncoderConfig(**json.loads((folder / "config.json").read_text())) == CONFIG
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "avfusion"
    assert "DeepAVFusion.from_pretrained(" in card.text


def test_the_default_model_says_what_it_is(tmp_path):
    with torch.device("meta"):
        model = DeepAVFusion()
    assert model._hub_mixin_config == EncoderConfig()


def test_a_loaded_model_is_saved_as_it_was(saved, tmp_path):
    model, folder = saved
    load_encoder(folder).save_pretrained(tmp_path / "again")
    assert_same(model, DeepAVFusion.from_pretrained(tmp_path / "again"))


def test_no_key_is_lost_in_silence(saved):
    _, folder = saved
    state = load_file(folder / "model.safetensors")
    state.pop("fusion_norm.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"fusion_norm\.weight"):
        DeepAVFusion.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"missing \(1\): fusion_norm\.weight"):
        load_encoder(folder)


def test_folders_that_are_no_models(saved, tmp_path):
    _, folder = saved
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"model: no config\.json beside model\.safetensors"):
        load_encoder(folder)
    with pytest.raises(CheckpointError, match=r"a folder without model\.safetensors"):
        load_encoder(tmp_path)


def test_an_address_on_the_hub(saved, monkeypatch):
    model, folder = saved
    asked = []

    def fetched(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert_same(model, load_encoder("hf://org/name"))
    assert_same(model, load_encoder("hf://org/name@v1"))
    files = ["config.json", "model.safetensors"]
    assert asked == [("org/name", None, files), ("org/name", "v1", files)]


def test_what_the_hub_cannot_give_is_named(monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"hf://org/name: cannot be fetched \(LocalEntryNotFoundError: no net"):
        load_encoder("hf://org/name")


def test_a_model_is_pushed_with_its_config_and_card(saved, monkeypatch):
    model, folder = saved
    pushed = {}

    def upload(self, *, repo_id, folder_path, **_):
        pushed[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model.push_to_hub("org/name")
    assert pushed["org/name"].keys() == {"config.json", "model.safetensors", "README.md"}
    assert pushed["org/name"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_files_of_before_still_load(saved, tmp_path):
    model, _ = saved
    save_encoder(model, tmp_path / "encoder.safetensors")
    assert_same(model, load_encoder(tmp_path / "encoder.safetensors"))
