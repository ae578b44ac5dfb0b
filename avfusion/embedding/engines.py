"""Who does the work of `avfusion embed`: this process with workers that decode ahead, those of torchrun, or Ray Data.

All give the same batches to the same `Embedder`, and its rows to a `Store`.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from avfusion import distributed
from avfusion.common import Progress
from avfusion.data.workers import TIMEOUT
from avfusion.embedding.decode import Decoder, decoded
from avfusion.embedding.embed import Embedder
from avfusion.embedding.store import Rows, Store, StoreError
from avfusion.media.clip import ClipError


def embed_files(
    embedder: Embedder, files: Sequence[str], store: Store, *, num_workers: int = 0, timeout: float = TIMEOUT,
    cluster: torch.device | None = None, progress: bool = False,
) -> list[ClipError]:  # fmt: skip
    """Write the features of files to a store, but for those that are there; returns what could not be read.

    `num_workers` processes decode ahead; where they give nothing for `timeout` seconds, it ends. Of several processes
    of torchrun, each takes its share of the files, and gets what all could not read. `cluster`: embed by Ray Data in
    the cluster that `join_cluster` has joined, on devices of this kind.

    However it ends, what is done is written.
    """
    todo = [file for file in files if file not in store.whole]
    embedder.decoder.skip = store.begun
    if cluster is not None:
        rows = _ray(embedder, todo, cluster)
    else:
        todo = todo[distributed.rank() :: distributed.world_size()]
        rows = map(embedder, decoded(embedder.decoder, todo, num_workers, timeout))
    failed = []
    try:
        with Progress(0, "window", show=progress and not distributed.rank()) as shown:
            known: dict[str, int] = {}  # windows of the files that are begun
            each = embedder.decoder.frames if embedder.keep_frames else 1  # rows of a window
            for batch in rows:
                bad = batch["reason"] != ""
                failed += [ClipError(*args) for args in zip(*(batch[n][bad] for n in ("file", "stream", "reason")),
                                                            strict=True)]  # fmt: skip
                store.add({name: x[~bad] for name, x in batch.items()})
                for file, count in zip(batch["file"], batch["windows"].tolist(), strict=True):
                    known[file] = max(count - len(store.begun.get(file, ())), known.get(file, 0))
                shown.total = round(sum(known.values()) * max(len(todo) / len(known), 1))  # the others are like these
                shown.update(
                    shown.done + int((~bad).sum()) // each, files=f"{len(known)}/{len(todo)}", failed=len(failed)
                )
        store.flush()
    except StoreError:
        store.release()
        raise
    except BaseException:
        store.close(failed, stopped=True)
        raise
    failed = distributed.gather(failed)
    store.close(failed)
    return failed


def join_cluster(address: str | None = None, device: str = "auto") -> torch.device:
    """Join a Ray cluster (None: one of this machine's own); returns the kind of device that embedders have there.

    `device` is "cuda", "cpu", or "auto": the cluster's GPUs, if it has any. This process needs none. Raises
    ConnectionError where no cluster is, and ValueError where it has no GPU, or the address cannot be one.
    """
    import ray

    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    gpus = ray.cluster_resources().get("GPU", 0) >= 1
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: the cluster has no GPU; take auto or cpu")
    return torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)


def _ray(embedder: Embedder, files: Sequence[str], device: torch.device) -> Iterator[Rows]:
    """Decoding as tasks on every core and an `Embedder` a GPU; without GPUs, one a core that decodes for itself."""
    import ray
    from ray.data import ActorPoolStrategy

    if not files:
        return
    found = ray.data.from_items([{"file": file} for file in files], override_num_blocks=min(len(files), 1000))
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    decoder, how = embedder.decoder, embedder.arguments() | {"device": device.type}
    if device.type == "cuda":
        rows = found.map_batches(decoder, batch_size=1).map_batches(
            Embedder, fn_constructor_kwargs=how, batch_size=decoder.batch_size, num_gpus=1,
            compute=ActorPoolStrategy(size=gpus),
        )  # fmt: skip
    else:
        rows = found.map_batches(
            _Alone, fn_constructor_kwargs=how | {"decoder": decoder}, batch_size=1, num_cpus=1,
            compute=ActorPoolStrategy(size=min(cpus, len(files))),
        )  # fmt: skip
    try:
        yield from rows.iter_batches(batch_size=None, batch_format="numpy")
    except ray.exceptions.RayError as error:  # its text is the traceback of another process
        raise RuntimeError(f"Ray: {str(error).strip().splitlines()[-1]}") from error


class _Alone(Embedder):
    """An embedder that decodes for itself: files to rows, a batch of windows at a time."""

    def __init__(self, decoder: Decoder, **how):
        super().__init__(**how)
        self.decoder = decoder

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Iterator[Rows]:
        yield from map(super().__call__, self.decoder(batch))
