"""The command line, `avfusion COMMAND`: a file a command. Arguments in, one call, an exit status out.

0 is success, 3 where some clips failed, 1 a failure with one line that says what to do, 2 a command line that cannot be
meant, 130 Ctrl-C and 143 SIGTERM. Modules of commands are loaded when they are called for, and so is what they need.
"""

import os
import sys
import warnings
from importlib import import_module

import avfusion
from avfusion.cli.options import Parser
from avfusion.common import unknown
from avfusion.tasks import DOWNSTREAM, TASKS

COMMANDS = {
    "demo": "see all of it at once, in under a minute",
    "embed": "turn video files into features",
    "search": "find the windows most like a clip, a sound or a picture",
    "synth": "make a data set with ground truth",
    "shard": "pack a data set for fast reading",
    "browse": "look at a data set",
    "runs": "list training runs: how far each is, and what it has found",
    "report": "what trained models make of your clips, as pages",
    "export": "write an encoder as one file: safetensors, the authors', ONNX, torch.export",
} | {name: does for name, (_, _, does) in TASKS.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line on `argv` (None: the process's own) and return its exit status; usage errors exit with 2."""
    argv, missing = sys.argv[1:] if argv is None else list(argv), avfusion._missing()
    parser = Parser(
        prog="avfusion", description="DeepAVFusion: early fusion of picture and sound.",
        epilog=f"`avfusion COMMAND --help` explains a command. {missing or ''}",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"avfusion {avfusion.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        parser.error(unknown("command", chosen, COMMANDS))
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == chosen:
            if missing and name in TASKS:  # their options are the settings of a model
                parser.error(missing)
            import_module(f"avfusion.cli.{'downstream' if name in DOWNSTREAM else name}").add_arguments(command, name)
    args = parser.parse_args(argv)
    if missing:
        parser.error(missing)
    return _run(args)


def _run(args) -> int:
    prog, shown = args.parser.prog, warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest, **options) -> None:
        if category is not UserWarning:
            shown(message, category, *rest, **options)
        elif os.environ.get("RANK", "0") == "0":  # the first of several processes
            print(f"{prog}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            return args.run(args)
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped by Ctrl-C. {args.stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `avfusion ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # what a library raises, too: a traceback is for developers
        if os.environ.get("AVF_DEBUG"):
            raise
        told = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError | RuntimeError) or not told:
            told = f"{type(error).__name__}: {told} (AVF_DEBUG=1 shows where)"
        print(f"{prog}: error: {told}", file=sys.stderr)
        return 1
