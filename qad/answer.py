"""``qad run``: one answer, streamed from an exported file through its runtime, or from a server."""

import sys
from pathlib import Path

from rich.console import Console

from qad.errors import UserError
from qad.runtimes import Sampling, open_model


def answer(
    file: Path,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    threads: int | None,
) -> None:
    """Print the answer piece by piece, then how fast it came.

    Raises:
        UserError: The file is missing or damaged, its runtime is not installed, the server does not answer or breaks
            off, or the prompt is too long.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8 text: check the encoding of the terminal") from error
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    session = open_model(file, threads=threads)
    shown = False
    try:
        tokens = session.chat_prompt(prompt)
        for piece in session.stream(tokens, new_tokens, sampling):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            shown = shown or bool(piece.text)
            if piece.ending is not None:
                end = piece.ending
                count = f"{end.new_tokens} token{'s' if end.new_tokens != 1 else ''}"
                Console(stderr=True).print(
                    f"\n[dim]{count}, {end.tokens_per_second:.1f} tokens/s "
                    f"(prompt of {end.prompt_tokens} in {end.prompt_seconds:.2f} s), ended by {end.reason}[/]"
                )
    except UserError as error:
        if not shown:
            raise
        sys.stdout.write("\n")
        raise UserError(f"{error}; the text above is what came until then") from error
    finally:
        session.close()
    sys.stdout.write("\n")
