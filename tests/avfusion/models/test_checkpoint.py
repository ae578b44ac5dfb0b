"""Weights in and out: the authors' files, safetensors, unimodal MAE, and everything that does not fit."""

import argparse
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from avfusion import CheckpointError, DeepAVFusion, EncoderConfig, files, load_encoder, save_encoder
from avfusion.models import checkpoint
from avfusion.models.checkpoint import _infer_config, load_unimodal
from avfusion.tasks.pretrain import PRESETS, PretrainConfig

CONFIG = EncoderConfig(dim=64, depth=2, num_heads=1, image_size=(32, 32), audio_size=(128, 32))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DeepAVFusion(CONFIG)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def authors_state(model):
    """A pre-training state dict as the release saves it: encoder with prefix, decoders beside it."""
    state = {f"encoder.{key}": value for key, value in model.state_dict().items()}
    return state | {"image_decoder_embed.weight": torch.zeros(4, 4), "audio_decoder_mask_token": torch.zeros(1, 1, 4)}


def test_save_and_load_round_trip_with_config(model, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(model, path)
    loaded = load_encoder(path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert_same_weights(loaded, model)
    assert list(tmp_path.iterdir()) == [path]  # no partial file stays behind


assumes = pytest.mark.filterwarnings("ignore:.*neither keys nor shapes tell num_heads")  # narrow encoders


@assumes
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("optimizer", [True, False])
def test_the_authors_checkpoint_loads_without_being_told_its_shape(model, tmp_path, prefixed, optimizer):
    state = authors_state(model) if prefixed else model.state_dict()
    content = {"state_dict": state, "epoch": 200, "n_steps": torch.tensor([7])}
    if optimizer:
        content["optimizer"] = torch.optim.AdamW(model.parameters()).state_dict()
    path = tmp_path / "checkpoint_latest.pth"
    torch.save(content, path)
    loaded = load_encoder(path)
    assert loaded.config == CONFIG
    assert_same_weights(loaded, model)


@assumes
@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "dense", "fusion_tokens": 32},
        {"fusion": "token", "fusion_tokens": 7},
        {"fusion": "none"},
        {"fusion_layers": "0"},
        {"fusion_mlp_ratio": 4.0, "fusion_attn_ratio": 0.5, "mlp_ratio": 2.0},
        {"dim": 128, "num_heads": 2, "audio_size": (128, 48), "image_size": (48, 48)},
    ],
)
def test_the_shape_of_every_kind_of_encoder_is_read_off_its_keys(changes, tmp_path):
    config = replace(CONFIG, **changes)
    model = DeepAVFusion(config)
    torch.save({"state_dict": authors_state(model)}, tmp_path / "c.pth")
    loaded = load_encoder(tmp_path / "c.pth")
    assert loaded.config == config
    assert_same_weights(loaded, model)


@assumes
def test_an_unusual_split_of_fusion_tokens_has_to_be_told(tmp_path):
    config = replace(CONFIG, fusion_tokens=4, image_agg_tokens=3, audio_agg_tokens=2)
    torch.save(DeepAVFusion(config).state_dict(), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"pass config=: 9 tokens are not .*; give fusion_tokens, image_agg_"):
        load_encoder(tmp_path / "c.pth")
    assert load_encoder(tmp_path / "c.pth", config).config == config
    assert load_encoder(tmp_path / "c.pth", image_agg_tokens=3, audio_agg_tokens=2).config == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": 192, "num_heads": 3}, "num_heads=3, fusion_num_heads=12"),  # queries 48 wide: 12 heads are possible
        ({"dim": 128, "num_heads": 2}, "num_heads=2, fusion_num_heads=2"),
        ({"dim": 768, "num_heads": 12, "fusion_tokens": 12},
         "image_agg_tokens=8, audio_agg_tokens=8|fusion_tokens=12"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_does_not_tell_is_named_when_it_is_assumed(changes, told, tmp_path):
    config = replace(CONFIG, depth=1, fusion_num_heads=12 if changes["dim"] == 192 else 0, **changes)
    torch.save(DeepAVFusion(config).state_dict(), tmp_path / "c.pth")
    with pytest.warns(UserWarning, match=rf"c\.pth: neither keys nor shapes tell .*({told}).*: assumed"):
        assert load_encoder(tmp_path / "c.pth").config == config


def test_heads_that_are_told_are_not_assumed(tmp_path, recwarn):
    torch.save(DeepAVFusion(replace(CONFIG, num_heads=2, fusion_num_heads=4)).state_dict(), tmp_path / "c.pth")
    loaded = load_encoder(tmp_path / "c.pth", num_heads=2, fusion_num_heads=4)
    assert (loaded.config.num_heads, loaded.fusion_blocks["0"].attn.num_heads) == (2, 4)
    assert not recwarn.list


def test_what_is_known_otherwise_than_a_file_tells_is_refused(model, tmp_path):
    save_encoder(model, tmp_path / "e.safetensors")
    assert load_encoder(tmp_path / "e.safetensors", fusion_num_heads=1).config == CONFIG
    with pytest.raises(CheckpointError, match=r"^\S*e\.safetensors: the file itself tells fusion_num_heads=1, not 2$"):
        load_encoder(tmp_path / "e.safetensors", fusion_num_heads=2)
    with pytest.raises(TypeError, match="load_encoder: depth: expected some of num_heads, fusion_num_heads"):
        load_encoder(tmp_path / "e.safetensors", depth=2)
    with pytest.raises(TypeError, match="load_encoder: num_heads: config tells it already"):
        load_encoder(tmp_path / "e.safetensors", CONFIG, num_heads=1)


def test_the_released_encoders_are_told_by_their_shapes(recwarn):
    """Both released models, 268.4 and 326.9 million weights: nothing is assumed."""
    for preset, millions in (("paper-vggsound", 268.4), ("paper-audioset", 326.9)):
        config = PretrainConfig.of(data="x", **PRESETS[preset]).encoder
        with torch.device("meta"):
            state = DeepAVFusion(config).state_dict()
        assert _infer_config(state, {}, "c.pth") == config
        assert round(sum(x.numel() for key, x in state.items() if "pos_embed" not in key) / 1e6, 1) == millions
    assert config.fusion_attn_ratio == 1.0
    assert not recwarn.list


@assumes
def test_widths_that_do_not_tell_the_heads_need_a_config(tmp_path):
    """Heads are 64 wide in the release; no tensor has their shape."""
    model = DeepAVFusion(EncoderConfig(dim=96, depth=1, num_heads=4))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"pass config=: 96 wide, which is not a multiple of 64"):
        load_encoder(tmp_path / "x.pth")
    assert_same_weights(load_encoder(tmp_path / "x.pth", model.config), model)


@pytest.mark.parametrize("config", ["vitb.yaml", "[1]", {"dim": 3}])
def test_what_others_call_config_is_not_the_shape(model, config, tmp_path):
    torch.save({"state_dict": model.state_dict(), "config": config}, tmp_path / "x.pth")
    assert_same_weights(load_encoder(tmp_path / "x.pth"), model)


def test_keys_that_are_neither_encoder_nor_decoder_are_named_in_a_warning(model, tmp_path):
    torch.save({"state_dict": authors_state(model) | {"head.weight": torch.zeros(2)}}, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match=r"left out, as not the encoder's: head\.weight"):
        load_encoder(tmp_path / "c.pth")


def test_missing_extra_and_misshapen_keys_are_all_listed_and_nothing_loads(model, tmp_path):
    state = model.state_dict()
    del state["fusion_norm.weight"], state["audio.norm.bias"]
    state |= {"cls_token": torch.zeros(1), "image.norm.weight": torch.zeros(65)}
    save_file(state, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_encoder(tmp_path / "c.safetensors", CONFIG)
    message = str(error.value)
    assert "c.safetensors: does not fit DeepAVFusion; nothing was loaded" in message
    assert "missing (2): audio.norm.bias, fusion_norm.weight" in message
    assert "extra (1): cls_token" in message
    assert "misshapen (1): image.norm.weight [65] instead of [64]" in message


class Evil:
    def __reduce__(self):
        return (print, ("arbitrary code ran",))


def test_arbitrary_pickle_is_refused_and_does_not_run(tmp_path, capsys):
    torch.save({"state_dict": {"x": torch.zeros(1)}, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth: not a checkpoint of plain tensors \(Unpick.*\). Files that"):
        load_encoder(tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"plain\.pkl: not a checkpoint"):
        load_encoder(tmp_path / "plain.pkl")
    assert "arbitrary code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zero.pth", b"", "not a checkpoint of plain tensors"),
        ("text.pth", b"hello, this is text", "not a checkpoint of plain tensors"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS.*git lfs pull"),
        ("zero.safetensors", b"", "not a safetensors file"),
        ("text.safetensors", b"hello, this is text", "not a safetensors file"),
    ],
)
def test_files_that_are_no_checkpoints_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        load_encoder(tmp_path / name)


def test_a_missing_file_a_list_and_a_foreign_state_dict_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_encoder(tmp_path / "nowhere.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_encoder(tmp_path / "list.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="its keys do not tell the encoder's shape"):
        load_encoder(tmp_path / "other.pth")


def mae_state(vit, channels):
    """The key layout of MAE and AudioMAE: ours, plus a class token, longer positions, and a decoder."""
    state = {key: torch.randn_like(value) for key, value in vit.state_dict().items() if key != "pos_embed"}
    return state | {
        "cls_token": torch.zeros(1, 1, 64),
        "pos_embed": torch.zeros(1, 513, 64),
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_embed.weight": torch.zeros(32, 64),
        "decoder_blocks.0.norm1.weight": torch.zeros(32),
    }


@pytest.mark.parametrize("branch", ["image", "audio"])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_unimodal_mae_loads_all_but_class_token_positions_and_decoder(model, branch, wrapper, tmp_path):
    vit = getattr(model, branch)
    state, positions = mae_state(vit, 3), vit.pos_embed.clone()
    content = {wrapper: state, "args": argparse.Namespace(epochs=800)} if wrapper else state
    torch.save(content, tmp_path / "mae.pth")
    load_unimodal(vit, tmp_path / "mae.pth")
    assert torch.equal(vit.pos_embed, positions)
    loaded = vit.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded if key != "pos_embed")


def test_unimodal_weights_of_the_other_modality_do_not_fit(model, tmp_path):
    save_file(mae_state(model.audio, 1), tmp_path / "audio.safetensors")
    before = {key: value.clone() for key, value in model.image.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"misshapen \(1\): patch_embed.proj.weight \[64, 1, 16, 16\] instead of"):
        load_unimodal(model.image, tmp_path / "audio.safetensors")
    assert all(torch.equal(before[key], value) for key, value in model.image.state_dict().items())


def test_timm_weights_come_by_name(monkeypatch):
    import timm

    model = DeepAVFusion(replace(CONFIG, dim=768, num_heads=12, depth=12, fusion="none", image_size=(224, 224)))
    source = timm.create_model("vit_base_patch16_224.mae", pretrained=False, num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: source)
    load_unimodal(model.image, "vit_base_patch16_224.mae")
    assert torch.equal(model.image.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)


def test_timm_without_a_network_says_so_and_an_unknown_name_too(model, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr(checkpoint.timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"timm cannot fetch it .*no route to the hub.*pass a local file"):
        load_unimodal(model.image, "vit_base_patch16_224.mae")
    with pytest.raises(CheckpointError, match="neither a file nor one of timm"):
        load_unimodal(model.image, "vit_gigantic_imaginary")


def test_a_failed_save_leaves_the_old_file_alone(model, tmp_path, monkeypatch):
    path = tmp_path / "encoder.safetensors"
    save_encoder(model, path)
    before = load_file(path)

    def disk_full(state, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", disk_full)
    with pytest.raises(OSError, match="disk full"):
        save_encoder(DeepAVFusion(CONFIG), path)
    assert list(tmp_path.iterdir()) == [path]
    assert all(torch.equal(before[key], value) for key, value in load_file(path).items())
