"""A question is asked K times, side by side, and becomes one answer."""

import time

from qad.errors import UserError
from qad.final_answer import Kind
from qad.runtimes import Session
from qad.think.best import Scorer
from qad.think.conclusion import conclude
from qad.think.deliberation import check_deliberations
from qad.think.events import OnEvent
from qad.think.judge import Judge, Printer
from qad.think.options import ThinkOptions
from qad.think.pool import Pool
from qad.think.thought import Thought


def think(
    session: Session,
    question: str,
    options: ThinkOptions | None = None,
    *,
    kind: Kind | None = None,
    scorer: Scorer | None = None,
    printer: Printer | None = None,
    on_event: OnEvent | None = None,
) -> Thought:
    """Ask a model a question K times and return one answer.

    Args:
        session: The opened model.
        question: The user's message, complete.
        options: How.
        kind: How answers are compared; None: those that are marked as answers, as mathematics.
        scorer: What ``best`` goes by, in place of confidence. Every trajectory is then sampled to its end.
        printer: How answers of the kind ``code`` are compared: by what they print, those that print nothing by their
            text. Without it by their form, see ``qad.final_answer.same``.
        on_event: Called with every token and ending. A KeyboardInterrupt that it or the engine raises ends the
            sampling: what had ended is judged, and the thought says so. One while answers are compared ends that: then
            there is no vote, and the texts are there.

    Raises:
        UserError: No question, or no room for what was asked; the message says what fits. What goes wrong once
            trajectories have ended is told in the notes.
    """
    options = options or ThinkOptions()
    if not question.strip():
        raise UserError("the question is empty: say what to ask")
    if scorer is not None and options.method != "best":
        raise UserError(f"the method {options.method} has no use for a scorer: use it with best")
    began = time.perf_counter()
    prompt = session.chat_prompt(question)
    if options.method == "deliberate":
        # Before K trajectories are sampled in vain.
        check_deliberations(session, question, options)
    judge = Judge(options, kind, scored=scorer is not None, printer=printer)
    pool = Pool(session, prompt, options, judge, on_event)
    pool.run(options.k, options.at_once, early=True)
    thought = conclude(session, question, options, judge, pool, scorer, on_event)
    thought.seconds = time.perf_counter() - began
    return thought
