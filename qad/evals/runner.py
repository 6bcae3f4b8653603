"""Asks a model the items of a task, K times each, and keeps every answer before the next question is asked."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qad import interrupts
from qad.bench_run import digest
from qad.closing import Closing
from qad.errors import UserError, unknown_name
from qad.evals.item_results import result_of
from qad.evals.metrics import ItemResult
from qad.evals.samples import Sample, SampleFile, fingerprint, judging
from qad.evals.setting import Setting
from qad.evals.task import Item, Task
from qad.runtimes import Lost, Sampling, Session, Step, Trajectory, is_url, open_model, plain_url
from qad.think import ThinkOptions, deliberate
from qad.think.confidence import lowest_window, mean_logprob
from qad.think.deliberation_prompt import Draft, check_room
from qad.think.opening_tag import opening, with_opening

# Why a trajectory ends by itself.
_WHOLE = ("stop", "length", "context")

METHODS = ("vote", "weighted", "best", "deliberate")


@dataclass(frozen=True)
class Asking:
    """How items are asked.

    Attributes:
        k: Trajectories of each.
        sampling: Rule and seed; each item draws from random streams of its own.
        new_tokens: Most tokens of a trajectory, and of a deliberation.
        window: Tokens over which the lowest mean log-probability is taken.
        deliberations: How many follow the trajectories; 0 for none.
        budget: Tokens of all trajectories in a deliberation's prompt; None: what the context has left.
    """

    k: int
    sampling: Sampling
    new_tokens: int
    window: int = 64
    deliberations: int = 0
    budget: int | None = None

    def of(self, item: Item) -> Sampling:
        """Return the sampling of an item: a seed of its own, the same for every model."""
        drawn = hashlib.sha256(f"{self.sampling.seed}\0{item.id}".encode()).digest()
        return dataclasses.replace(self.sampling, seed=int.from_bytes(drawn[:4], "big"))

    def setting(self, task: Task, task_seed: int, model: "Model") -> Setting:
        """Return what is kept beside the samples."""
        own = {"count": self.deliberations, "new_tokens": self.new_tokens, "budget": self.budget}
        return Setting(
            task=task.name,
            task_seed=task_seed,
            model=model.name,
            sha256=model.sha256,
            k=self.k,
            sampling=dataclasses.asdict(self.sampling),
            new_tokens=self.new_tokens,
            deliberation=own if self.deliberations else None,
            kind=task.kind,
            kv_type=model.kv_type,
            served=model.served,
        )


class Model(Closing):
    """A model that is opened when somebody asks it something, and then stays open.

    Args:
        source: As on the command line.
        name: In tables.
        options: Of ``open_model``.

    Attributes:
        source, name: As given.
        sha256: Of its file or folder; of a server, of its address.
        kv_type: Of its key-value cache.

    Raises:
        UserError: There is no such file.
    """

    def __init__(self, source: str, name: str, options: dict[str, Any]) -> None:
        self.source = source
        self.name = name
        if not is_url(source) and not Path(source).exists():
            raise UserError(f"{source} is missing: give an exported file, a run, a model folder or a server's address")
        # Which weights a server has, it does not tell: its address and what it tells of them stand for them.
        self.sha256 = (
            hashlib.sha256(plain_url(source).encode()).hexdigest() if is_url(source) else digest(Path(source))[0]
        )
        self.kv_type: str = options.get("kv_type", "f16")
        self._options = options
        self._session: Session | None = None
        self._served: dict[str, Any] | None = None

    @property
    def served(self) -> dict[str, Any] | None:
        """The server's address and what it tells of the model, for which it is asked once; None of other models.

        Raises:
            Unreachable: The server does not answer; see ``settle``.
            UserError: It has no such model.
        """
        if self._served is None and is_url(self.source):
            kept = self._session is not None
            told = self._told(self.session)
            if not kept:
                self.close()
            self._served = told
        return self._served

    def settle(self) -> None:
        """Take a server that does not answer for what its address says; it is not asked anything then."""
        self._served = {"address": plain_url(self.source)}

    def _told(self, session: Session) -> dict[str, Any]:
        from qad.runtimes.remote import RemoteSession

        assert isinstance(session, RemoteSession)
        return {"address": plain_url(self.source), **session.served}

    @property
    def session(self) -> Session:
        """The opened model.

        Raises:
            UserError: It cannot be opened, or a server tells another model than before.
        """
        if self._session is None:
            session = open_model(self.source, **self._options)
            if self._served is not None and (told := self._told(session)) != self._served:
                session.close()
                raise UserError(
                    f"{self.source} tells another model now ({told.get('id', 'none')}) than when this began "
                    f"({self._served.get('id', 'none')}): give the command again, which says what is kept of which"
                )
            self._session = session
        return self._session

    def close(self) -> None:
        """Free the model. May be called twice."""
        if self._session is not None:
            self._session.close()
            self._session = None


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Return methods, each known.

    Raises:
        UserError: One is not.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", method, list(METHODS))
    return tuple(methods)


def run_task(
    model: Model, task: Task, file: SampleFile, asking: Asking, on_item: Callable[[ItemResult, bool], None]
) -> list[ItemResult]:
    """Ask what is not answered yet, and return the results of all items, in their order.

    What was answered and judged by other rules is judged anew first.

    Args:
        model: Who is asked.
        task: Of what.
        file: Where answers are kept; what it has already is not asked again.
        asking: How.
        on_item: Called after each item with its result, and whether it was asked now.

    Raises:
        UserError: The model cannot be opened, fails or has no room for an item; the judge cannot work; the disk is
            full. What was answered before is kept.
    """
    file.judge_anew(task, lambda item, sample: _judged(task, item, sample))
    results = []
    for item in task.items:
        # The longest question before hours are spent on the others.
        if len(file.samples(item, deliberation=True)) < asking.deliberations:
            interrupts.check()
            try:
                check_room(
                    model.session,
                    item.prompt,
                    asking.k,
                    new_tokens=asking.new_tokens,
                    side_by_side=asking.deliberations,
                    budget=asking.budget,
                )
            except UserError as error:
                raise UserError(f"item {item.id} of {task.name}: {error}") from error
    for item in task.items:
        interrupts.check()
        try:
            asked = _answer(model, task, item, file, asking)
        except UserError as error:
            raise UserError(f"item {item.id} of {task.name}: {error}") from error
        result = result_of(file.samples(item), file.samples(item, deliberation=True), task.kind)
        results.append(result)
        on_item(result, asked)
    return results


def _answer(model: Model, task: Task, item: Item, file: SampleFile, asking: Asking) -> bool:
    """Ask for what an item lacks, keep it, and return whether it lacked anything."""
    have = file.samples(item)
    for first, count in _gaps({one.index for one in have}, asking.k):
        _sample(model, task, item, file, asking, first, count)
    deliberated = file.samples(item, deliberation=True)
    # More than are asked for now are no fault: they were made before.
    lacking = max(0, asking.deliberations - len(deliberated))
    if lacking:
        _deliberate(model, task, item, file, asking, {one.index for one in deliberated})
    return len(have) < asking.k or lacking > 0


def _gaps(have: set[int], k: int) -> list[tuple[int, int]]:
    """Return (first, count) of each run of indexes below k that are not there."""
    runs: list[tuple[int, int]] = []
    for index in range(k):
        if index in have:
            continue
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _sample(model: Model, task: Task, item: Item, file: SampleFile, asking: Asking, first: int, count: int) -> None:
    """Ask for trajectories ``first``, ``first + 1`` ..., and keep those that were complete, whatever happens."""
    session = model.session
    prompt = session.chat_prompt(item.prompt)
    judge = _Judge(model, task, item, asking, opening(session, prompt))
    # A prompt of which a part is in the cache is computed in other kernels than a whole one, and rounds otherwise (see
    # the runtimes' ``sample``): each item begins from nothing, so that it gives the same bits wherever a run went on.
    session.forget()
    try:
        made = session.sample(
            prompt,
            count,
            # Trajectory i draws from the i-th stream, also where those before it were made earlier.
            dataclasses.replace(asking.of(item), first=first),
            new_tokens=asking.new_tokens,
            # A server is asked for all of them at once only if nobody looks at single tokens.
            on_token=None if is_url(model.source) else _check,
        )
    except Lost as lost:
        whole = [one for one in lost.trajectories if one.reason in _WHOLE]
        if whole:
            file.append([judge.sample(one, first + one.index, asking.k) for one in whole])
        raise
    file.append([judge.sample(one, first + one.index, asking.k) for one in made])


def _deliberate(model: Model, task: Task, item: Item, file: SampleFile, asking: Asking, have: set[int]) -> None:
    """Deliberate on the trajectories of an item, and keep what is not there yet."""
    options = ThinkOptions(
        k=asking.k,
        method="deliberate",
        sampling=asking.of(item),
        new_tokens=asking.new_tokens,
        summary_k=asking.deliberations,
        budget=asking.budget,
    )
    drafts = [Draft(one.text, one.reason == "stop") for one in file.samples(item) if one.text.strip()]
    # Where nobody wrote anything there is nothing to judge, which the model is told.
    # As in ``_sample``: the question's prompt is in the cache only where the trajectories were made just now.
    model.session.forget()
    made = deliberate(model.session, item.prompt, drafts or [Draft("(nothing)")], options)
    whole = [one for one in made if one.reason in _WHOLE]
    judge = _Judge(model, task, item, asking)
    new = [judge.sample(one, one.index, asking.deliberations) for one in whole if one.index not in have]
    if new:
        file.append([dataclasses.replace(one, deliberation=True) for one in new])
    if len(whole) < asking.deliberations:
        raise UserError("the model stopped while it deliberated")


def _check(step: Step) -> None:
    """Notice an interrupt that an engine swallowed."""
    interrupts.check()


class _Judge:
    """Makes samples of trajectories.

    Args:
        model, task, item, asking: Whose.
        opening: The tag that stands before their texts, where the prompt opened their thoughts with it.
    """

    def __init__(self, model: Model, task: Task, item: Item, asking: Asking, opening: str = "") -> None:
        self._model, self._task, self._item, self._window = model, task, item, asking.window
        self._opening = opening

    def sample(self, made: Trajectory, index: int, k: int) -> Sample:
        """Return the judged sample of a trajectory."""
        task, item = self._task, self._item
        text = with_opening(self._opening, made.text)
        score = task.score(item, text, made.reason)
        # A server may know the log-probabilities of some tokens only.
        known = [one for one in made.logprobs if math.isfinite(one)]
        return Sample(
            id=item.id,
            task=task.name,
            model=self._model.name,
            k=k,
            index=index,
            text=text,
            answer=score.answer,
            correct=score.correct,
            format_ok=score.format_ok,
            detail=score.detail,
            level=item.level,
            n_tokens=len(made.tokens),
            mean_logprob=mean_logprob(known) if known else None,
            lowest_window_logprob=lowest_window(known, self._window) if known else None,
            reason=made.reason,
            seconds=made.seconds,
            item=fingerprint(item),
            judged=judging(task, item),
        )


def _judged(task: Task, item: Item, sample: Sample) -> Sample:
    """Return a sample with the verdict of the rules that there are now."""
    interrupts.check()
    score = task.score(item, sample.text, sample.reason)
    return dataclasses.replace(
        sample, answer=score.answer, correct=score.correct, format_ok=score.format_ok, detail=score.detail
    )
