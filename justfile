# `pip install rust-just`, then `just test`; or copy the line.

# What the tests say, a process a core
test *args:
    pytest -n logical {{ args }}

# Faults done to running commands; changed files and arguments; the kernels under sanitizers
faults minutes="30":
    pytest -m chaos -n logical --dist load --summary=bench/results/chaos.json
    pytest -m fuzz --minutes={{ minutes }} --summary=bench/results/fuzz.json
    pytest tests/avfkernels/test_sanitizer.py

# Format, lint, types
check:
    ruff format . && ruff check . && mypy

# The paper's table
bench *args:
    pytest bench/ --benchmark {{ args }}

# The site, at http://127.0.0.1:8000
docs:
    mkdocs serve

# All that CI does, in a fresh environment
ci:
    .ci/run

# Wheel and source distribution in dist/, checked
dist:
    python -m build && auditwheel show dist/*.whl && twine check --strict dist/*

# Tag a version: CHANGELOG.md and pyproject.toml name it already; the workflow builds and publishes
release version:
    grep -q '^version = "{{ version }}"' pyproject.toml && grep -q '^## \[{{ version }}\]' CHANGELOG.md
    git tag -a v{{ version }} -m v{{ version }} && git push origin v{{ version }}
