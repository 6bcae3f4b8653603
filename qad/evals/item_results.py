"""From the samples of an item to what became of it: votes are counted here, no model is asked."""

from collections.abc import Sequence
from pathlib import Path

from qad.errors import UserError
from qad.evals.metrics import ItemResult
from qad.evals.samples import Rows, Sample, no_samples
from qad.evals.setting import setting_beside
from qad.evals.task import JUDGING
from qad.final_answer import Kind
from qad.think import vote
from qad.think.confidence import weight


def _best(samples: Sequence[Sample]) -> int:
    """Return the index of the best sample, by what `qad think` goes by; of equals, the first.

    One that ended by itself is better than one that was cut off, then one with an answer than one without, then the one
    whose lowest window is the most likely, if that is known of all.
    """
    known = [one.lowest_window_logprob for one in samples]
    sure = [0.0] * len(known) if None in known else [value or 0.0 for value in known]
    return max(
        range(len(samples)),
        key=lambda index: (samples[index].reason == "stop", samples[index].answer is not None, sure[index], -index),
    )


def _voted(samples: Sequence[Sample], kind: Kind, weights: Sequence[float] | None = None) -> tuple[int, float]:
    """Return the index of the sample whose answer wins, and its share; as `qad think`, the best if nobody has one."""
    found = vote([one.answer for one in samples], kind, weights)
    return (_best(samples), 0.0) if found.index is None else (found.index, found.share)


def representative(samples: Sequence[Sample], kind: Kind | None) -> Sample:
    """Return the sample that stands for an item: the one that speaks for the vote, or else the first."""
    return samples[0] if kind is None else samples[_voted(samples, kind)[0]]


def result_of(samples: Sequence[Sample], deliberations: Sequence[Sample], kind: Kind | None) -> ItemResult:
    """Return what became of an item.

    Args:
        samples: Its trajectories, by index.
        deliberations: Its deliberations, if there are any.
        kind: How answers are compared; None where they cannot be: then there are no votes.
    """
    chosen: dict[str, bool] = {}
    share = voted_logprob = None
    confidences = [one.lowest_window_logprob for one in samples]
    known = [value for value in confidences if value is not None]
    if kind is not None:
        index, share = _voted(samples, kind)
        chosen["vote"] = samples[index].correct
        voted_logprob = samples[index].mean_logprob
        if len(known) == len(samples):
            chosen["weighted"] = samples[_voted(samples, kind, [weight(value) for value in known])[0]].correct
    if len(known) == len(samples):
        chosen["best"] = samples[_best(samples)].correct
    first = samples[0]
    return ItemResult(
        id=first.id,
        item=first.item,
        level=first.level,
        correct=tuple(one.correct for one in samples),
        answered=tuple(one.answer is not None for one in samples),
        cut_off=tuple(one.reason != "stop" for one in samples),
        format_ok=tuple(one.format_ok for one in samples),
        n_tokens=tuple(one.n_tokens for one in samples),
        mean_logprobs=tuple(one.mean_logprob for one in samples),
        seconds=max(one.seconds for one in samples),
        chosen=chosen,
        share=share,
        voted_logprob=voted_logprob,
        deliberated=tuple(one.correct for one in deliberations),
        extra_tokens=sum(one.n_tokens for one in deliberations),
        extra_seconds=max((one.seconds for one in deliberations), default=0.0),
        # Behind the number of the rules.
        judge=first.judged.partition(" ")[2],
    )


def read_results(path: Path) -> tuple[str, str, list[ItemResult]]:
    """Return the model's name, the task's name and the results of a file of samples; unfinished items are left out.

    Raises:
        UserError: It cannot be read, is none, holds no complete item, or one that was judged by other rules.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: check the path")
    results = []
    others = 0
    try:
        with path.open("rb") as file:
            # First: what is no file of samples has no setting to bring back.
            rows = Rows(file, path)
            if not rows.ids() and not path.with_suffix(".json").is_file():
                raise no_samples(path)
            setting = setting_beside(path)
            for item in rows.ids():
                samples = rows.read(item)
                if len(samples) == setting.k:
                    others += any(not by.startswith(f"{JUDGING} ") for by in rows.judged(item))
                    results.append(result_of(samples, rows.read(item, deliberation=True), setting.kind))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    if others:
        raise UserError(
            f"{others} of {len(results)} items in {path} were judged by the rules of another qad: give the `qad eval` "
            "that made them once more, which judges the kept texts anew and asks no model"
        )
    if not results:
        raise UserError(f"{path} holds no complete item yet: let `qad eval` finish first")
    return setting.model, setting.task, results
