"""`accelerate` on a stand-in for the authors' classes: same numbers, same parameters, and back again."""

import copy
import json
from pathlib import Path

import pytest
import torch
from played import play_graphs
from safetensors import safe_open
from torch import nn

from avfkernels import DenseFusion, FactorizedFusion, TokenFusion, accelerate, capture, layer
from bench.authors_style import AVMAE, Encoder

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = {"token": TokenFusion, "dense": DenseFusion, "factorized": FactorizedFusion}
SMALL = {"dim": 64, "depth": 2, "num_heads": 4, "image_size": (64, 48), "audio_size": (32, 48), "tokens": (5, 3, 4)}


def build(fusion, **options):
    torch.manual_seed(0)
    return Encoder(fusion, **SMALL | options).double()


def batch(B=2):
    g = torch.Generator().manual_seed(0)
    images, sounds = (
        torch.randn(B, *size, generator=g, dtype=torch.float64) for size in ((3, *SMALL["image_size"]), (1, 32, 48))
    )
    return images, sounds


def masks(B=2):
    g = torch.Generator().manual_seed(1)
    return [torch.rand(B, n, generator=g).argsort(1)[:, :kept] for n, kept in ((12, 5), (6, 2))]


def run(model, *inputs, seed=0, **options):
    """Outputs, those of every layer, and the gradients of all parameters."""
    torch.manual_seed(seed)
    *out, embs = model(*inputs, return_embs=True, **options)
    tensors = [*out, *(x for layer in embs for x in layer)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(sum(x.sin().sum() for x in out), parameters, allow_unused=True)
    return tensors, grads


def assert_equal(got, expected):
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stand_in_computes_what_the_authors_modules_do_and_so_does_what_replaces_it(kind):
    with safe_open(GOLDEN / f"encoder_{kind}.safetensors", "pt") as file:
        arguments, golden = file.metadata(), {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    encoder = Encoder(
        kind, json.loads(arguments["fusion_tkns"]), None, *(int(arguments[n]) for n in ("dim", "depth", "num_heads")),
        json.loads(arguments["image_size"]), json.loads(arguments["audio_size"]),
        float(arguments["fusion_mlp_ratio"]), float(arguments["fusion_attn_ratio"]),
    ).double()  # fmt: skip
    model = AVMAE(encoder)
    weights = {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.encoder.")}
    model.load_state_dict(weights | {k: v for k, v in model.state_dict().items() if "decoder" in k})

    def worst():
        with torch.no_grad():
            out = encoder(golden["image"], golden["audio"])
        expected = [golden[f"full_{name}"] for name in ("image", "audio", "fusion")]
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(out, expected, strict=True))

    assert worst() < 1e-5
    accelerate(model)
    assert worst() < 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [None, (1,), ()])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_stay(kind, layers, masked):
    model, inputs = build(kind, fusion_layers=layers), (*batch(), *(masks() if masked else ()))
    expected = run(model, *inputs)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    theirs = list(model.fusion_blocks)

    restore = accelerate(model)
    fused = range(2) if layers is None else layers
    assert [type(block) for block in model.fusion_blocks] == [
        KINDS[kind] if i in fused else type(None) for i in range(2)
    ]
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_equal(run(model, *inputs), expected)

    restore()
    assert list(model.fusion_blocks) == theirs
    assert list(model.state_dict()) == keys
    assert_equal(run(model, *inputs), expected)


def test_a_model_that_holds_the_encoder():
    model, inputs = AVMAE(build("factorized")).double(), (*batch(), *masks())
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(*inputs), parameters, allow_unused=True)
    restore = accelerate(model)
    assert isinstance(model.encoder.fusion_blocks[0], FactorizedFusion)
    got = torch.autograd.grad(model(*inputs), parameters, allow_unused=True)
    assert_equal(([], got), ([], expected))
    restore()
    accelerate(model)  # once more


def test_training_goes_on_in_the_same_parameters():
    """Steps before, during and after; a checkpoint loaded and a move in between reach the restored model too."""
    model, reference = build("dense"), build("dense")
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (model, reference)]
    restore = None
    for step in range(3):
        if step == 1:
            restore = accelerate(model)
        if step == 2:
            model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})
            reference.load_state_dict({k: v + 0.01 for k, v in reference.state_dict().items()})
            model.float().double(), reference.float().double()
            restore()
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            sum(x.sin().sum() for x in m(*batch())).backward()
            optimizer.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-6, atol=1e-7, msg=name)


def test_drop_path_draws_the_same_numbers():
    model = build("factorized", drop_path=0.5)
    expected = run(model, *batch(B=6))
    accelerate(model)
    assert_equal(run(model, *batch(B=6)), expected)
    with pytest.raises(AssertionError):
        assert_equal(run(model, *batch(B=6), seed=1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_in_training_and_rests_in_eval(kind):
    model, plain = (build(kind, attn_drop=p, drop=p) for p in (0.5, 0.0))
    restore = accelerate(model)
    assert not torch.equal(model(*batch())[2], model(*batch())[2])
    model.eval()
    torch.testing.assert_close(model(*batch()), plain(*batch()))
    restore()
    assert not any(module.training for module in model.modules())


def test_attention_dropout_has_the_same_distribution():
    """Mean and deviation of the tokens after a layer, over 400 draws, within five standard errors."""
    model, draws = build("dense", depth=1, attn_drop=0.3), 400
    inputs = [x.expand(draws, -1, -1, -1) for x in batch(B=1)]
    with torch.no_grad():
        expected = torch.cat(model(*inputs, return_embs=True)[3][0], dim=1)
        accelerate(model)
        got = torch.cat(model(*inputs, return_embs=True)[3][0], dim=1)
    deviation = expected.std(0)
    assert ((got.mean(0) - expected.mean(0)).abs() / deviation).max() < 5 * (2 / draws) ** 0.5
    assert (got.std(0) / deviation - 1).abs().max() < 5 * (1 / draws) ** 0.5


def test_copies_are_independent_and_hooks_of_layers_run():
    model = build("dense")
    seen = []
    model.fusion_blocks[0].attn.q.register_forward_hook(lambda *_: seen.append(1))
    accelerate(model)
    twin = copy.deepcopy(model)
    expected = model(*batch())
    nn.init.zeros_(model.fusion_norm.weight)
    torch.testing.assert_close(twin(*batch()), expected)
    assert not torch.allclose(model(*batch())[2], expected[2])
    assert len(seen) == 3


def hooked(model, path):
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    return model


class Adapter(nn.Linear):
    """As LoRA: what it computes is not its weight alone."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def adapted(model, path):
    owner, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    setattr(model.get_submodule(owner), name, Adapter(old.in_features, old.out_features))
    return model


@pytest.mark.parametrize(
    ("change", "path"),
    [(hooked, path) for path in ("image.blocks.0", "audio.blocks.1.attn", "image.blocks.1.attn.qkv", "fusion_blocks.0",
                                 "fusion_blocks.0.attn", "fusion_blocks.1.attn.attn_v", "fusion_blocks.1.attn.k")]
    + [(adapted, path) for path in ("image.blocks.0.attn.qkv", "fusion_blocks.0.attn.attn_a.kv",
                                    "fusion_blocks.0.attn.v")],
)  # fmt: skip
def test_modules_that_would_be_gone_around_are_refused(change, path):
    model = change(build("factorized"), path)
    reason = "has hooks" if change is hooked else "is a Adapter that does more"
    with pytest.raises(ValueError, match=rf"accelerate: model\.{path} {reason}"):
        accelerate(model)
    assert "forward" not in vars(model)


def test_the_keys_and_values_of_token_fusion_are_one_layer_that_is_called():
    model = adapted(hooked(build("token"), "fusion_blocks.0.attn.kv"), "fusion_blocks.1.attn.kv").double()
    expected = run(model, *batch())
    accelerate(model)
    assert_equal(run(model, *batch()), expected)


def test_modules_of_layers_without_fusion_may_have_hooks():
    seen, model = [], build("dense", fusion_layers=(1,))
    model.image.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    accelerate(model)
    model(*batch())
    assert seen == [1]


@pytest.mark.parametrize("name", ["norm", "gate"])
def test_parts_of_attention_that_newer_versions_of_timm_have_are_refused(name):
    model = build("dense")
    setattr(model.image.blocks[0].attn, name, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=rf"image\.blocks\.0\.attn\.{name}.* is not supported"):
        accelerate(model)


def test_a_saved_model_comes_back(tmp_path):
    model = build("factorized")
    accelerate(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)  # a file of our own
    torch.testing.assert_close(again(*batch()), model(*batch()))
    nn.init.zeros_(again.fusion_norm.weight)
    assert not torch.allclose(again(*batch())[2], model(*batch())[2])


def test_compiles_whole():
    torch._dynamo.reset()
    model = build("factorized", fusion_layers=(1,))
    expected = model(*batch(), *masks())
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch(), *masks()), expected)


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU, with the fused layer uncompiled; the batches that graphs were made for."""
    monkeypatch.setattr(layer, "_compiled", lambda function: function)
    return play_graphs(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_what_loses_is_left_alone_until_a_shape_is_compiled(kind, gpu):
    model = build(kind, fusion_layers=(1,)).eval()
    inputs = batch(B=60)
    calls = []
    theirs = type(model.fusion_blocks[1])
    forward = theirs.forward
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = model(*inputs)
        patch.setattr(theirs, "forward", lambda *a: calls.append(1) or forward(*a))
        restore = accelerate(model)
        assert ("left alone as released" in restore.report["fusion_blocks.1"]) == (kind != "dense")
        for _ in range(5):
            torch.testing.assert_close(model(*inputs), expected, rtol=1e-10, atol=1e-10)
    assert len(calls) == (0 if kind == "dense" else 3)  # 60, 120 and 180 clips
    assert gpu == [60]


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_training_is_compiled_too_and_compile_false_never(kind, gpu):
    model, inputs = build(kind), batch(B=60)
    expected = run(model, *inputs)
    restore = accelerate(model)
    for _ in range(5):
        torch.manual_seed(0)
        out = model(*inputs)
    assert gpu == []
    grads = torch.autograd.grad(
        sum(x.sin().sum() for x in out), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    assert_equal((out, grads), (expected[0][:3], expected[1]))
    restore()
    restore = accelerate(model, compile=False)
    with torch.no_grad():
        for _ in range(5):
            model.eval()(*inputs)
    assert gpu == []
    assert ("uncompiled (compile=False), left alone" in restore.report["fusion_blocks.0"]) == (kind != "dense")


def test_the_report_names_every_layer_and_a_failure(gpu, monkeypatch):
    model = build("factorized", fusion_layers=(1,))
    restore = accelerate(AVMAE(model).eval())
    assert restore.report == {
        "encoder.fusion_blocks.0": "no fusion in this layer: as released",
        "encoder.fusion_blocks.1": "FactorizedFusion: R1, R2, R3; on a GPU, before 200 clips of a shape, left alone as "
        "released, which has fewer launches",
    }

    def fails(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(capture, "record", fails)
    model.requires_grad_(False)
    inputs = batch(B=200)
    with pytest.warns(UserWarning, match="Encoder runs uncompiled: RuntimeError: no compiler"), torch.no_grad():
        model(*inputs)
    assert "uncompiled (no compiler), left alone as released" in restore.report["encoder.fusion_blocks.1"]


def without(model, path):
    owner, _, name = path.rpartition(".")
    delattr(model.get_submodule(owner), name)
    return model


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda m: nn.Linear(2, 2), "Linear holds no encoder of DeepAVFusion: .*Linear, has no image, audio, fusion_"),
        (lambda m: without(m, "fusion_norm"), "comes closest, Encoder, has no fusion_norm"),
        (lambda m: nn.Sequential(without(m, "fusion_tokens")), "closest, Encoder, has no fusion_tokens"),
        (lambda m: without(m, "image.pos_embed"), r"model\.image \(ViT\) has no pos_embed"),
        (lambda m: without(m, "audio.blocks.1.norm2"), r"model\.audio\.blocks\.1 \(Block\) has no norm2"),
        (lambda m: AVMAE(without(m, "image.blocks.0.attn.qkv")), r"encoder\.image\.blocks\.0\.attn .* has no qkv"),
        (lambda m: without(m, "fusion_blocks.1.norm1_aud"), r"fusion_blocks\.1 \(FusionBlock\) has no norm1_aud"),
        (lambda m: without(m, "fusion_blocks.1.attn.kv"), r"fusion_blocks\.1\.attn \(DenseAttention\) has no kv"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_and_nothing_changes(break_, message):
    model = break_(build("dense"))
    blocks = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"accelerate: .*{message}"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == blocks
    assert "forward" not in vars(model)


def test_other_refusals():
    model = build("dense")
    model.fusion_blocks[0].attn.kv = nn.Linear(96, 32)
    with pytest.raises(ValueError, match=r"fusion_blocks\.0 is not the TokenFusion .* attn\.kv\.weight .* \[32, 96\]"):
        accelerate(model)

    model = build("dense")
    accelerate(model)
    with pytest.raises(ValueError, match=r"model\.forward has been replaced already; restore it first"):
        accelerate(model)

    class Video(Encoder):
        def forward(self, video, audio):
            return super().forward(video, audio)

    with pytest.raises(ValueError, match="forward takes video, audio; expected image, audio, image_ids_keep"):
        accelerate(Video("dense", **SMALL))


def test_a_compiled_model_is_refused_with_what_to_do():
    for compiled in (torch.compile(build("dense"), backend="eager"), build("dense")):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        with pytest.raises(ValueError, match="the model is compiled: accelerate it first, and compile"):
            accelerate(compiled)
    wrapped = torch.nn.Sequential(torch.compile(build("dense"), backend="eager"))
    with pytest.raises(ValueError, match="accelerate: 0 is compiled"):
        accelerate(wrapped)
    accelerate(wrapped[0]._orig_mod)()


def test_restoring_twice_is_harmless():
    model = build("dense")
    blocks = list(model.fusion_blocks)
    restore = accelerate(model)
    restore()
    restore()
    assert list(model.fusion_blocks) == blocks
    again = accelerate(model)
    restore()  # of the first time: it leaves the second alone
    assert list(model.fusion_blocks) != blocks
    again()
    assert list(model.fusion_blocks) == blocks
