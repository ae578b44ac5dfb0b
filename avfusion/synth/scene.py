"""What happens in a clip: which objects are there, what they look and sound like, when they play, how they move."""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avfusion.synth.looks import LOOKS
from avfusion.synth.timbres import TIMBRES

TASKS = ("classes", "conjunction", "synchrony")
RADIUS = ((0.15, 0.24), (0.13, 0.19), (0.1, 0.15))  # of one, two, three objects
CLOSE_RADIUS = (0.24, 0.34)  # in a close-up
CLOSE_CENTRE = (0.15, 0.85)  # there the range of x and of y
CLOSE_APART = 0.4  # there from centre to centre, at least
PAUSE = 0.45  # how far a silent, motionless object is lit, on the scale of `Actor.drive`


@dataclass(frozen=True)
class Settings:
    """What a data set is made of: two sets with equal settings hold the same bytes.

    Raises ValueError where a value is out of range.
    """

    layout: str = "vggsound"
    clips: int = 200
    seed: int = 0
    task: str = "classes"
    classes: int = 12  # looks, timbres, and labels (synchrony has two labels)
    size: int = 224  # pixels, height and width
    seconds: float = 4.0
    fps: int = 8

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}: expected one of {', '.join(TASKS)}")
        if not 2 <= self.classes <= len(LOOKS):
            raise ValueError(f"classes={self.classes}: expected 2 to {len(LOOKS)}")
        if self.clips < 1 or self.seed < 0 or self.fps < 1:
            raise ValueError(f"clips={self.clips}, seed={self.seed}, fps={self.fps}: expected at least 1, 0 and 1")
        if self.size < 32 or self.size % 2:
            raise ValueError(f"size={self.size}: expected an even number of at least 32 pixels, as H.264 stores it")
        if not 1 <= self.seconds <= 600:
            raise ValueError(f"seconds={self.seconds}: expected 1 to 600")

    @property
    def names(self) -> list[str]:
        """Names of the task's labels."""
        if self.task == "synchrony":
            return ["left one sounding", "right one sounding"]
        if self.task == "conjunction":
            return [f"pairing {label:02d}" for label in range(self.classes)]
        return [f"{look.name} {timbre.name}" for look, timbre in zip(LOOKS, TIMBRES, strict=True)][: self.classes]


@dataclass(frozen=True)
class Note:
    onset: float  # seconds
    stop: float
    level: float  # in (0, 1]
    pitch: float  # relative to the actor's own


@dataclass(frozen=True)
class Actor:
    """One thing in a scene: seen, heard, or both. Lengths are fractions of the frame's side, y points down."""

    look: int | None  # None: off screen
    timbre: int | None  # None: silent
    label: int | None  # the task's label that this actor stands for
    notes: tuple[Note, ...] = ()
    struck: bool = False  # notes ring out by themselves instead of lasting until they stop
    inverse: bool = False  # plays the pauses: the silent twin of the synchrony task
    gain: float = 1.0
    seed: int = 0  # of its texture and its timbre's details
    radius: float = 0.2
    centre: tuple[float, float] = (0.5, 0.5)
    wander: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # amplitude, frequency in Hz and phase, for x and for y
    tilt: float = 0.0  # radians

    @property
    def onscreen(self) -> bool:
        return self.look is not None

    @property
    def sounding(self) -> bool:
        return self.timbre is not None

    def envelope(self, t: np.ndarray) -> np.ndarray:
        """Loudness in [0, 1] at times `t` (seconds)."""
        loudness = np.zeros_like(t)
        for note in self.notes:
            if self.struck:
                since = np.maximum(t - note.onset, 0)
                shape = (1 - np.exp(-since / 0.004)) * np.exp(-since / 0.2)
            else:
                # Rise and fall are mirror images, so that an inverse rhythm looks like any other.
                shape = np.clip((t - note.onset) / 0.1 + 0.5, 0, 1) * np.clip((note.stop - t) / 0.1 + 0.5, 0, 1)
            np.maximum(loudness, note.level * shape, out=loudness)
        return 1 - loudness if self.inverse else loudness

    def drive(self, times: np.ndarray) -> np.ndarray:
        """What brightness and motion follow: the mean loudness in the 120 ms around `times`."""
        if not self.notes:
            return np.full(len(times), PAUSE)
        around = np.linspace(-0.06, 0.06, 13)
        return self.envelope((times[:, None] + around).ravel()).reshape(len(times), -1).mean(1)


@dataclass(frozen=True)
class Scene:
    """A clip before it is rendered. `actors` lie in the order in which they are painted."""

    id: str  # 11 characters, as YouTube's
    start: int  # seconds into the video that the clip pretends to come from
    seed: int  # of the background
    seconds: float
    actors: tuple[Actor, ...]
    label: int
    look: int  # of the main object
    timbre: int
    side: int | None  # synchrony: 0 left, 1 right

    @property
    def labels(self) -> list[int]:
        """The labels of everything that sounds, on screen or off."""
        return sorted({actor.label for actor in self.actors if actor.sounding and actor.label is not None})


def draw_scene(
    settings: Settings,
    index: int,
    *,
    sources: int = 1,
    seconds: float | None = None,
    close: bool = False,
    alone: bool = False,
) -> Scene:
    """Draw clip `index` of a data set, with `sources` sounding objects on screen (synchrony: always one of two).

    `close` (not of twins) is a close-up: objects are large and anywhere, also where the edge of the picture cuts them.
    In the classes task one beside them is silent, so that the picture does not tell which of them sounds. `alone`:
    nothing else is seen or heard, as in recordings of music.

    Labels are balanced: of every K clips of the classes task each label has one, of K^2 clips of the conjunction task
    each pair of look and timbre has one, and there label = (look + timbre) mod K. Neither look nor timbre then says
    anything about the label, and the additive model of both that fits best is the constant one (though one that is
    chosen to be right, and not to be likely, can be: for four classes in 11 of the 16 pairs).
    """
    rng = np.random.default_rng([settings.seed, index])
    count, task, seconds = settings.classes, settings.task, seconds or settings.seconds
    cells = {"classes": count, "conjunction": count * count, "synchrony": 2 * count}[task]
    block, place = divmod(index, cells)
    cell = int(np.random.default_rng([settings.seed, block, 1]).permutation(cells)[place])
    side = None
    if task == "classes":
        look = timbre = label = cell
    elif task == "conjunction":
        look, timbre = divmod(cell, count)
        label = (look + timbre) % count
    else:
        (look, side), timbre = divmod(cell, 2), int(rng.integers(count))
        label = side

    if task == "synchrony":
        actors = _twins(rng, look, timbre, side, seconds)
    else:
        cast = [(look, timbre, label)]
        others = rng.permutation([k for k in range(count) if k != look]).tolist()
        for k in others[: sources - 1]:
            heard = k if task == "classes" else int(rng.integers(count))
            cast.append((k, heard, k if task == "classes" else (k + heard) % count))
        # A pair of look and timbre stays unambiguous where nothing else is seen or heard.
        if task == "classes" and not alone:
            silent = 1 if close else int(rng.integers(0, 4 - len(cast)))
            cast += [(k, None, k) for k in others[sources - 1 : sources - 1 + silent]]
            if rng.random() < 0.25 and len(others) > sources - 1 + silent:
                cast.append((None, others[-1], others[-1]))
        actors = _place(rng, cast, seconds, rhythm_tells=task == "classes", close=close)
    name = base64.urlsafe_b64encode(hashlib.sha256(f"{settings.seed} {index}".encode()).digest()[:8])[:11].decode()
    start, background = int(rng.integers(0, 300)), int(rng.integers(2**31))
    return Scene(name, start, background, seconds, tuple(actors), label, look, timbre, side)


def _place(rng: np.random.Generator, cast: list, seconds: float, *, rhythm_tells: bool, close: bool) -> list[Actor]:
    """Give every member (look, timbre, label) of the cast a rhythm, and the visible ones a place and a path.

    A rhythm is seen too: unless `rhythm_tells`, it does not depend on the timbre.
    """
    visible = sum(look is not None for look, _, _ in cast)
    slots = iter(rng.permutation(visible))
    actors = []
    for look, timbre, label in cast:
        struck = TIMBRES[timbre].struck if rhythm_tells and timbre is not None else bool(rng.integers(2))
        still = timbre is None and rng.random() < 0.5  # the other silent ones move to a rhythm that nobody hears
        notes = () if still else _notes(rng, struck, seconds)
        gain = rng.uniform(0.7, 1) if look is not None else rng.uniform(0.25, 0.4)
        radius = rng.uniform(*(CLOSE_RADIUS if close else RADIUS[visible - 1]))
        if look is None:
            body = {}
        elif close:
            body = _close_body(rng, [actor.centre for actor in actors if actor.onscreen], radius)
        else:
            body = _body(rng, next(slots), visible, radius)
        seed = int(rng.integers(2**31))
        actors.append(Actor(look, timbre, label, notes, struck, gain=float(gain), seed=seed, **body))
    return sorted(actors, key=lambda actor: actor.centre[1])  # the nearer, the lower in the frame


def _twins(rng: np.random.Generator, look: int, timbre: int, side: int, seconds: float) -> list[Actor]:
    """Two look-alikes, left and right: one plays, the other does the same in its pauses.

    On and off alternate with the same lengths, so that what is seen is the same whichever of the two is heard.
    """
    notes, t = [], -rng.uniform(0.15, 0.8)
    on = bool(rng.integers(2))
    while t < seconds + 0.2:  # beyond both ends, where a rise that begins or does not begin would give them away
        length = rng.uniform(0.4, 0.9)
        if on:
            notes.append(Note(float(t), float(t + length), 1.0, _interval(rng)))
        t, on = t + length, not on
    seed, radius, actors = int(rng.integers(2**31)), rng.uniform(0.14, 0.19), []
    for slot in (0, 1):
        heard = slot == side
        heard_as = (timbre, side) if heard else (None, None)
        body = _body(rng, slot, 2, radius)
        actors.append(Actor(look, *heard_as, tuple(notes), inverse=not heard, seed=seed, **body))
    return actors


def _interval(rng: np.random.Generator) -> float:
    return float(rng.choice([1, 9 / 8, 5 / 4, 3 / 2, 5 / 3]))  # a pentatonic scale


def _notes(rng: np.random.Generator, struck: bool, seconds: float) -> tuple[Note, ...]:
    notes, t = [], rng.uniform(0, 0.3)
    while t < seconds:
        length = 0.0 if struck else rng.uniform(0.3, 0.8)
        notes.append(Note(float(t), float(t + length), float(rng.uniform(0.6, 1)), _interval(rng)))
        t += rng.uniform(0.3, 0.7) if struck else length + rng.uniform(0.2, 0.5)
    return tuple(notes)


def _body(rng: np.random.Generator, slot: int, slots: int, radius: float) -> dict:
    """Where an object is and how it moves: in one of `slots` columns, most of the time."""
    reach = 1.3 * radius + 0.02  # swelling and shadow included
    room = max(0.5 / slots - radius, 0.03)
    roam = 0.4 * room
    x = np.clip((slot + 0.5) / slots + rng.uniform(-0.6, 0.6) * room, reach + roam, 1 - reach - roam)
    y = rng.uniform(max(0.42, reach + 0.14), 1 - reach - 0.06)  # room above for hopping
    return _moving(rng, radius, (x, y), (roam, 0.05))


def _close_body(rng: np.random.Generator, others: list[tuple[float, float]], radius: float) -> dict:
    """The same for an object of a close-up: the first one's centre is uniform, and leaves room for the next."""
    while True:
        centre = rng.uniform(*CLOSE_CENTRE, 2)
        if all(math.dist(centre, other) >= CLOSE_APART for other in others):
            return _moving(rng, radius, centre, (0.02, 0.02))


def _moving(rng: np.random.Generator, radius: float, centre: Sequence[float], roam: tuple[float, float]) -> dict:
    wander = [v for reach in roam for v in (reach, rng.uniform(0.08, 0.3), rng.uniform(0, 6.3))]
    return {"radius": float(radius), "centre": tuple(map(float, centre)), "wander": tuple(map(float, wander)),
            "tilt": float(rng.uniform(-0.3, 0.3))}  # fmt: skip
