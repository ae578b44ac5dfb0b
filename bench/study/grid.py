"""The study's questions: which cells are compared, and in which order they are run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bench.study.cell import PRETRAIN_EPOCHS, Cell

MEASURES = {
    "probe class all": "class, probe",
    "probe class image": "class, probe of image tokens",
    "finetune class mean": "class, fine-tuned",
    "finetune conjunction mean": "conjunction, fine-tuned",
    "kernel conjunction fusion": "conjunction, kernel on fusion tokens",
    "kernel conjunction all": "conjunction, kernel on all tokens",
    "pointing contrast": "which of two objects sounds, contrast",
    "pointing attention": "which of two objects sounds, attention",
    "recall@10": "retrieval, recall@10",
}
# What guessing reaches.
CHANCE = dict(zip(MEASURES, ("8.3 %", "8.3 %", "8.3 %", "25 %", "25 %", "25 %", "50 %", "50 %", "2.0 %"), strict=True))
# The same of one modality alone, in encoders without fusion; localisation and retrieval need both.
UNIMODAL = {
    f"{name} alone": (f"probe class {part}", "", f"finetune class {part}", f"finetune conjunction {part}",
                      f"kernel conjunction {part}", f"kernel conjunction {part}", "", "", "")
    for name, part in (("picture", "image"), ("sound", "audio"))
}  # fmt: skip
# The picture alone is right in 75 %, the sound in 50 %, and no sum of both in more than 75 %.
SYNCHRONY = {f"{way} synchrony {part}": f"{part} tokens, {way}"
             for part in ("image", "audio", "image+audio", "fusion", "all")
             for way in ("linear", "kernel")}  # fmt: skip


@dataclass(frozen=True)
class Question:
    title: str
    cells: dict[str, Cell]  # by what they are called in the question's table; the first is what others are held against
    seeds: int = 5
    measures: dict[str, str] = field(default_factory=lambda: MEASURES)


DENSE = Cell()
NONE, TOKEN, FACTORIZED = Cell(fusion="none", layers="none"), Cell(fusion="token"), Cell(fusion="factorized")
PRODUCT = Cell(interaction="product")
QUESTIONS = {
    "layers": Question("Which layers have dense fusion (Table 5)",
                       {"none": NONE, "late (the last of 4)": Cell(layers="3"),
                        "mid (the last two)": Cell(layers="2-3"), "early (all)": DENSE}, seeds=6),
    "kinds": Question("Which kind of fusion (Table 5)",
                      {"token": TOKEN, "factorized": FACTORIZED, "dense": DENSE,
                       "dense, products": PRODUCT}, seeds=6),
    "synchrony": Question("Which of two look-alikes sounds (3,072 labels; readers of frozen tokens)",
                          {name: replace(cell, world="synchrony") for name, cell in
                           (("no fusion", NONE), ("from scratch", replace(NONE, epochs=0)), ("token", TOKEN),
                            ("factorized", FACTORIZED), ("dense", DENSE), ("dense, products", PRODUCT))},
                          seeds=3, measures=SYNCHRONY),
    **{f"pretraining {name}": Question(f"Pre-trained or from scratch ({name})",
                                       {"from scratch": replace(cell, epochs=0), "pre-trained": cell})
       for name, cell in (("no fusion", NONE), ("dense", DENSE), ("factorized", FACTORIZED))},
    "tokens": Question("How many fusion tokens (dense; Table 7)",
                       {"16": DENSE, "4": Cell(tokens=4), "8": Cell(tokens=8), "32": Cell(tokens=32)}),
    "aggregates": Question("How many aggregation tokens a modality (factorized; Table 7)",
                           {"8": FACTORIZED, "4": Cell(fusion="factorized", aggregates=4),
                            "16": Cell(fusion="factorized", aggregates=16)}),
    "residual": Question("What the fusion tokens' residual is added to (dense)",
                         {"normalised tokens (as released)": DENSE, "the tokens as they come": Cell(residual="plain")}),
    "masks": Question("How much is hidden in pre-training (dense; image / audio)",
                      {"75 / 80 %": DENSE, "50 / 50 %": Cell(image_mask=0.5, audio_mask=0.5),
                       "90 / 90 %": Cell(image_mask=0.9, audio_mask=0.9)}),
    "length": Question("How long pre-training is (dense; Fig. 3)",
                       {f"{PRETRAIN_EPOCHS} epochs": DENSE, "3 epochs": Cell(epochs=3), "40 epochs": Cell(epochs=40)},
                       seeds=3),
}  # fmt: skip


def order() -> list[Cell]:
    """All cells, the most informative first: three seeds of every question in turn, then their other seeds."""
    found = {}
    for low, high in ((0, 3), (3, 5), (5, 8)):
        for question in QUESTIONS.values():
            for seed in range(low, min(high, question.seeds)):
                found |= {replace(cell, seed=seed): None for cell in question.cells.values()}
    return list(found)
