"""What each checkpoint weighs in an average: the ways to choose it, and what they reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import AdapterLabError
from ..power import Floats, decays, gamma, musubi_betas, profile_error, solve, unrolled
from ..power import weights as closed_form
from ..power import width as width_of
from ..streams import PathLike
from .order import Checkpoint, Course, ordered, read, some

_FAR = 0.1  # profile error above which a width counts as out of reach
_PART = 0.02  # of the mass that may be missing


@dataclass(frozen=True)
class Settings:
    """Of an average.

    Attributes:
        sigma_rel: width relative to the length of the training, in (0, 0.2886].
        beta, beta2: decays of the first and, if given, the last file of "musubi beta".
    """

    sigma_rel: float = 0.15
    beta: float = 0.95
    beta2: float | None = None


@dataclass(frozen=True)
class Plan:
    """Which files make an average, and with what weights.

    Attributes:
        profile: one of ``PROFILES``, or "weights" that were given.
        course: the files. weights: of each, float64.
        betas: decay of each merge, of the second file on; none where weights alternate in sign.
        recursion: whether the betas are to be carried out one after the other.
        end: the last step. error: of the profile, None where none is solved for.
    """

    profile: str
    settings: Settings
    course: Course
    weights: Floats
    betas: tuple[float, ...] = ()
    recursion: bool = False
    error: float | None = None

    @property
    def files(self) -> list[Checkpoint]:
        """In the order of training."""
        return self.course.checkpoints

    @property
    def end(self) -> int:
        """The last step."""
        return self.course.times[-1]

    @property
    def snapshots(self) -> list[tuple[float, float]]:
        """(step, width) of tracked averages."""
        pairs = zip(self.files, self.course.times, strict=True)
        return [(float(t), c.sigma_rel or 0.0) for c, t in pairs]

    @property
    def width(self) -> float | None:
        """The width of the weights of ordinary checkpoints."""
        return None if self.error is not None else width_of(self.course.times, list(self.weights))


def plan(
    paths: Sequence[PathLike],
    profile: str = "reconstruct",
    settings: Settings | None = None,
    *,
    order: str = "step",
    first: int = 0,
    last: int = 0,
) -> Plan:
    """Weights for the checkpoints ``paths``.

    Args:
        order: one of ``ORDERS``. first, last: see :meth:`Course.cut`.

    Raises:
        AdapterLabError: as :func:`read`, :func:`ordered` and :meth:`Course.cut`; no such profile;
            a setting out of range; no files of the kind that the profile works on.
    """
    if profile not in PROFILES:
        raise AdapterLabError(f"There is no profile '{profile}'", expected=", ".join(PROFILES))
    settings = settings or Settings()
    files = read(paths)
    tracked = profile == "reconstruct"
    kept = [c for c in files if not c.averaged and (c.sigma_rel is not None) == tracked]
    if not kept:
        raise _wrong_kind(files, tracked)
    course = ordered(kept, order).cut(first, last)
    for one in files:
        if one not in kept:
            course.left_out[one.name] = _kind(one)
    if len(course.times) < 2:
        raise AdapterLabError(
            "There is nothing to average", found=f"only '{course.checkpoints[0].name}'",
            expected="two or more checkpoints of a training",
        )  # fmt: skip
    return PROFILES[profile](course, settings)


def _reconstruct(course: Course, settings: Settings) -> Plan:
    if course.unit == "file":
        raise AdapterLabError(
            "The steps of these averages are not known",
            found=some(f"'{c.name}'" for c in course.checkpoints),
            fix="Name them as training did, with the step, or choose the order 'step'",
        )
    end = course.times[-1]
    draft = Plan("reconstruct", settings, course, closed_form([1.0]))
    found = solve(draft.snapshots, settings.sigma_rel, end)
    error = profile_error(draft.snapshots, list(found), settings.sigma_rel, end)
    total = float(found.sum())
    if error > _FAR:
        course.warnings.append(
            f"sigma_rel {settings.sigma_rel:g} is out of reach of these snapshots: the profile is "
            f"off by {error:.1%}. Save more often, or choose a width nearer to those tracked"
        )
    if abs(total - 1) > _PART:
        course.warnings.append(
            f"The weights sum up to {total:.3f}: what the factors were before the first snapshot "
            "is not known"
        )
    return Plan("reconstruct", settings, course, found, error=error)


def _power(course: Course, settings: Settings) -> Plan:
    found = closed_form(course.times, settings.sigma_rel)
    return Plan("power", settings, course, found, tuple(decays(list(found))))


def _musubi_power(course: Course, settings: Settings) -> Plan:
    betas = musubi_betas(len(course.times), sigma_rel=settings.sigma_rel)
    course.warnings.append(
        f"'{course.checkpoints[0].name}' has weight 0, as in musubi-tuner: its first decay is 0"
    )
    return _recursion("musubi power", course, settings, betas)


def _musubi_beta(course: Course, settings: Settings) -> Plan:
    betas = musubi_betas(len(course.times), settings.beta, settings.beta2)
    return _recursion("musubi beta", course, settings, betas)


def _recursion(name: str, course: Course, settings: Settings, betas: list[float]) -> Plan:
    return Plan(name, settings, course, unrolled(betas), tuple(betas), recursion=True)


PROFILES: dict[str, Callable[[Course, Settings], Plan]] = {
    "reconstruct": _reconstruct,
    "power": _power,
    "musubi power": _musubi_power,
    "musubi beta": _musubi_beta,
}


def facts(made: Plan) -> list[tuple[str, str]]:
    """(name, value) of what the plan is, for people."""
    settings, times = made.settings, made.course.times
    found = [
        ("profile", made.profile),
        ("files", f"{len(times)}, {made.course.unit} {times[0]} to {times[-1]}"),
    ]
    if made.profile in ("reconstruct", "power", "musubi power"):
        width = settings.sigma_rel
        found.append(("sigma_rel", f"{width:g} (gamma {gamma(width):.4f})"))
    if made.profile == "musubi beta":
        more = "" if settings.beta2 is None else f" to {settings.beta2:g}"
        found.append(("beta", f"{settings.beta:g}{more}"))
    if made.error is not None:
        found.append(("profile error", f"{made.error:.2%}"))
        found.append(("sum of the weights", f"{float(made.weights.sum()):.6f}"))
    elif made.width is not None and (made.weights >= 0).all():
        found.append(("width of these weights", f"{made.width:.4f} of the training"))
    return found


def _kind(one: Checkpoint) -> str:
    if one.averaged:
        return "it was averaged from files already"
    return "no tracked average" if one.sigma_rel is None else "a tracked average"


def _wrong_kind(files: Sequence[Checkpoint], tracked: bool) -> AdapterLabError:
    names = some(f"'{c.name}' ({_kind(c)})" for c in files)
    if tracked:
        return AdapterLabError(
            "There are no tracked averages to reconstruct from",
            found=names,
            fix="Train with ema_tracking on, or choose the profile 'power', which takes ordinary "
            "checkpoints",
        )
    return AdapterLabError(
        "There are no ordinary checkpoints to average",
        found=names,
        fix="Choose the profile 'reconstruct' for averages that training tracked",
    )
