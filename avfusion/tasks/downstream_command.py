"""`avfusion probe | finetune | retrieve | localize | separate | segment`, each with train, eval and predict."""

import argparse
import json
from pathlib import Path

from avfusion.config import add_settings, given_settings
from avfusion.tasks.command import run
from avfusion.tasks.configs import PRESETS
from avfusion.tasks.registry import TASKS, task_class

# Name -> what it does, what it measures.
HELP = {
    "probe": ("recognise classes by linear classifiers on a frozen encoder",
              "top-1 and top-5 accuracy; for several labels a clip mAP, AUC and d-prime"),
    "finetune": ("recognise classes, all weights trained", "as for probe"),
    "retrieve": ("find the picture of a sound, and the sound of a picture",
                 "recall at 1, 5 and 10, median rank, and nearest neighbours of the same label"),
    "localize": ("find where in the picture the sound comes from",
                 "cIoU@0.5 and AUC, beside the pre-trained encoder's own maps and the centre of the picture"),
    "separate": ("separate mixed sounds by their pictures",
                 "SDR, SIR and SAR (BSS Eval v3), beside the mixture and the oracle mask"),
    "segment": ("segment what sounds",
                "mIoU and F score (beta^2 = 0.3), as the benchmark and as the release define them"),
}  # fmt: skip
EPILOG = """\
examples:
  avfusion {name} train tiny --encoder runs/tiny
  avfusion {name} train paper --encoder runs/vggsound --data /data/set --out runs/{name}
  avfusion {name} eval runs/{name}-tiny
  avfusion {name} predict runs/{name}-tiny my.mp4 --out predictions
"""


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add the tasks to the command line's commands."""
    for name, (text, measures) in HELP.items():
        parser = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. Measures {measures}.",
            epilog=EPILOG.format(name=name), formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        actions = parser.add_subparsers(metavar="ACTION", required=True)

        train = actions.add_parser("train", help="train on a data set", description=text)
        train.add_argument("preset", metavar="PRESET", choices=PRESETS[name],
                           help="where the settings start from: " + " | ".join(PRESETS[name]))  # fmt: skip
        train.add_argument("--out", type=Path, metavar="RUN", help=f"folder of the run (default: runs/{name}-PRESET)")
        train.add_argument("--resume", action="store_true", help="go on from RUN's last checkpoint, if there is one")
        add_settings(train, TASKS[name][0])
        train.set_defaults(run=_train, parser=train, task=name)

        evaluate = actions.add_parser(
            "eval",
            help="evaluate a run: CSV a clip, summary, best and worst in pictures",
            description="Writes RUN/eval/: summary.json, samples.csv, best.png, worst.png.",
        )
        evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run")
        evaluate.add_argument("--eval-data", metavar="DATA", help="another data set, in the same layout")
        evaluate.add_argument("--eval-split", metavar="SPLIT", help="another split of it; all: everything")
        evaluate.add_argument("--layout", metavar="LAYOUT", help="its layout, if that is another one")
        evaluate.add_argument("--clips", type=int, default=10**9, metavar="N", help="at most so many (default: all)")
        evaluate.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/eval")
        evaluate.add_argument("--compile", action=argparse.BooleanOptionalAction,
                              help="torch.compile and CUDA graphs (default: on a GPU, from 200 clips on)")  # fmt: skip
        evaluate.set_defaults(run=_evaluate, parser=evaluate, task=name)

        predict = actions.add_parser(
            "predict",
            help="what a run says of your clips",
            description="Writes a JSON file a clip and what can be seen or heard beside it.",
        )
        predict.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run")
        predict.add_argument("clips", nargs="+", type=Path, metavar="CLIP", help="video files")
        predict.add_argument("--start", type=float, metavar="S", help="of the window in seconds (default: the middle)")
        predict.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR",
                             help="default: %(default)s")  # fmt: skip
        predict.set_defaults(run=_predict, parser=predict, task=name)


def _train(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    cls = TASKS[args.task][0]
    try:
        config = cls(**PRESETS[args.task][args.preset] | given_settings(args, cls))
    except ValueError as error:
        parser.error(str(error))
    out = args.out or Path("runs") / f"{args.task}-{args.preset}"
    return run(parser, lambda: task_class(args.task)(config), out, resume=args.resume)


def _evaluate(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from avfusion.tasks.evaluation import evaluate_run

    changes = {"eval_data": args.eval_data, "eval_split": args.eval_split, "layout": args.layout}
    changes = {name: value for name, value in changes.items() if value} | {"eval_clips": args.clips}
    changes |= {} if args.compile is None else {"compile": args.compile}
    out = args.out or args.run_folder / "eval"
    try:
        summary = evaluate_run(args.run_folder, args.task, out, **changes)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    width = max(map(len, summary))
    for name, value in summary.items():
        print(f"{name:{width}}  {value:.4f}")
    print(f"{out}: summary.json, samples.csv, best.png, worst.png")
    return 0


def _predict(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from avfusion.clips import ClipError, read_clip
    from avfusion.tasks.downstream import load_run
    from avfusion.tasks.evaluation import write_prediction

    try:
        task, model = load_run(args.run_folder, args.task)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    failed = 0
    for path in args.clips:
        try:
            clip = read_clip(path, start=args.start, **task.window)
        except ClipError as error:
            print(f"{parser.prog}: {error}")
            failed += 1
            continue
        prediction = task.predict(model, clip)
        for file in write_prediction(prediction, clip, args.out):
            print(file)
        short = {name: fact for name, fact in prediction.facts.items() if not isinstance(fact, list)}
        print(json.dumps({"clip": str(path)} | short))
    return 1 if failed else 0
