"""What the tests of exported models share."""

import pytest
import torch


def check(run, model, *batches):
    """Equal to the model, by norm to 1e-5, on every batch."""
    for batch in batches:
        with torch.no_grad():
            results = [out if isinstance(out, tuple | list) else (out,) for out in (run(*batch), model(*batch))]
        for got, expected in zip(*results, strict=True):
            assert got.shape == expected.shape
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def check_onnx(folder, model, dynamic_shapes, *batches):
    """Exports from the first batch; runs all in onnxruntime."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    names = [f"input{i}" for i in range(len(batches[0]))]
    program = torch.onnx.export(
        model, batches[0], dynamo=True, dynamic_shapes=dynamic_shapes, input_names=names, verbose=False
    )
    program.save(folder / "model.onnx", external_data=True)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(*inputs):
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, given)]

    check(run, model, *batches)
