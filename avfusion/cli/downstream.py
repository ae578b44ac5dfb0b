"""`avfusion TASK train | eval | predict`, for each of the tasks on top of an encoder."""

import argparse
import json
from pathlib import Path

from avfusion.cli import options
from avfusion.cli.pretrain import add_training
from avfusion.tasks import TASKS, task_class

EPILOG = """\
examples:
  avfusion {name} train tiny --encoder runs/tiny
  avfusion {name} train paper --encoder runs/vggsound --data /data/set --out runs/{name}
  avfusion {name} eval runs/{name}-tiny
  avfusion {name} predict runs/{name}-tiny my.mp4 --out predictions
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    does, measures = TASKS[name][2], task_class(name).measures
    parser.description = f"{does[0].upper()}{does[1:]}. Measures {measures}."
    parser.epilog, parser.formatter_class = EPILOG.format(name=name), options.RAW
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add_training(actions.add_parser("train", help="train on a data set", description=does), name, f"runs/{name}-PRESET")

    evaluate = actions.add_parser(
        "eval",
        help="evaluate a run: CSV a clip, summary, best and worst in pictures",
        description="Writes RUN/eval/: summary.json, samples.csv, best.png, worst.png.",
    )
    evaluate.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a run in the package, such as synth-small-localize",
    )
    add = evaluate.add_argument
    add("--eval-data", metavar="DATA", help="another data set, in the same layout")
    add("--eval-split", metavar="SPLIT", help="another split of it; all: everything")
    add("--layout", type=lambda text: text if text == "shards" else options.layout(text), metavar="LAYOUT",
        help="its layout, if that is another one")  # fmt: skip
    add("--clips", type=options.count(1), default=10**9, metavar="N", help="at most so many (default: all)")
    add("--out", type=Path, metavar="DIR", help="default: RUN/eval; of a run that is one file, NAME-eval here")
    if hasattr(task_class(name), "views"):
        add("--views", type=options.count(2), metavar="N",
            help="average the logits of N windows spread over 10 s of a clip, too (published scores: 10)")  # fmt: skip
        add("--tags", metavar="FILE", help="also score what is heard and what is seen, as VGGSounder does: a file "
            "such as annotations/vggsounder.csv of a synthetic set, or vggsounder for the labels of VGGSound in the "
            "package of that name")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile and CUDA graphs (default: on a GPU, from 200 clips on)")  # fmt: skip
    options.add_machine(evaluate)
    evaluate.set_defaults(run=run_eval, parser=evaluate, task=name, stopped="Nothing is written; run it again.")

    predict = actions.add_parser(
        "predict",
        help="what a run says of your clips",
        description="Writes a JSON file a clip and what can be seen or heard beside it.",
    )
    predict.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a run in the package, such as synth-small-localize",
    )
    predict.add_argument("clips", nargs="+", type=Path, metavar="CLIP", help="video files, or directories of them")
    predict.add_argument("--start", type=float, metavar="S", help="of the window in seconds (default: the middle)")
    predict.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: %(default)s")
    options.add_machine(predict)
    predict.set_defaults(run=run_predict, parser=predict, task=name,
                         stopped="What is listed above is written; name the other clips to go on.")  # fmt: skip


def run_eval(args: argparse.Namespace) -> int:
    from avfusion.tasks.downstream import evaluate_run

    device, run = options.machine(args), args.folder
    out = args.out or (run / "eval" if run.is_dir() else Path(f"{run.stem}-eval"))
    if args.out or run.is_dir():  # a misspelt run makes no folder
        options.check_folder(args.parser, "--out", out)
    changes = {"eval_data": args.eval_data, "eval_split": args.eval_split, "layout": args.layout}
    changes = {name: value for name, value in changes.items() if value} | {"eval_clips": args.clips}
    changes |= {} if args.compile is None else {"compile": args.compile}
    summary = evaluate_run(args.folder, args.task, out, device=device, dtype=options.dtype_of(args, device),
                           views=getattr(args, "views", None) or 0,
                           tags=getattr(args, "tags", None) or "", **changes)  # fmt: skip
    width = max(map(len, summary))
    for name, value in summary.items():
        print(f"{name:{width}}  {value:.4f}")
    print(f"{out}: summary.json, samples.csv, best.png, worst.png")
    return 0


def run_predict(args: argparse.Namespace) -> int:
    from avfusion.media.clip import ClipError
    from avfusion.media.reader import read_clip
    from avfusion.tasks.downstream import load_run, predict, write_prediction

    paths, device = options.video_files(args), options.machine(args)
    dtype = options.dtype_of(args, device)
    options.check_folder(args.parser, "--out", args.out)
    task, model = load_run(args.folder, args.task)
    model, failed = model.to(device), []
    for path in paths:
        try:
            clip = read_clip(path, start=args.start, **task.window)
        except ClipError as error:
            failed.append(error)
            continue
        prediction = predict(task, model, clip, dtype)
        for file in write_prediction(prediction, clip, args.out):
            print(file)
        short = {name: fact for name, fact in prediction.facts.items() if not isinstance(fact, list)}
        print(json.dumps({"clip": str(path)} | short))
    return options.report_failed(failed, len(paths))
