"""What chaos and fuzzing have found, as JSON and as a table."""

from pathlib import Path

import torch

from avfusion.files import write_json, write_text
from bench import measure


def write(path: Path, config, rows: list[dict]) -> None:
    """Rows of all tests; how they were called, where, and when."""
    rows = sorted(rows, key=lambda row: [str(row.get(name, "")) for name in ("fault", "target", "command")])
    words = " ".join(word for word in config.invocation_params.args)
    facts = {"command": f"pytest {words}", "device": measure.device_name(torch.device("cpu"))}
    facts |= measure.environment(torch.device("cpu")) | {"rows": rows}
    write_json(path, facts, indent=1)
    if rows:
        write_text(path.with_suffix(".md"), table(facts))


def table(facts: dict) -> str:
    names = [name for name in facts["rows"][0] if name != "seed"]
    lines = [f"`{facts['command']}`: {facts['device']}, commit {facts['commit']}, {facts['date']}.", "",
             f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]  # fmt: skip
    lines += [f"| {' | '.join(str(row.get(name, '')).replace('|', '/') for name in names)} |" for row in facts["rows"]]
    return "\n".join(lines) + "\n"
