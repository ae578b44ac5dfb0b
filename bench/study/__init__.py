"""The paper's claims on data that anyone can generate: `python -m bench.study`."""
