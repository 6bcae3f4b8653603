"""What a row is: plain ``text``, or a conversational ``prompt`` and ``completion``; and its stable identity.

Rows carry TRL's column names. Their ``sample_id`` depends on the content alone, so that a teacher's cache survives
shuffling, re-mixing and a change of seed.
"""

import hashlib
import json
from typing import Any

Message = dict[str, str]
Row = dict[str, Any]


def sample_id(row: Row) -> str:
    """Return 16 hexadecimal digits that depend on a row's content alone."""
    content = [row.get("text"), row.get("prompt"), row.get("completion")]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def with_id(row: Row) -> Row:
    """Return a row with every column present: None where it does not apply, and its ``sample_id``."""
    full = {"text": row.get("text"), "prompt": row.get("prompt"), "completion": row.get("completion")}
    return {**full, "sample_id": sample_id(full)}


def text_row(text: str) -> Row:
    """Return a plain text row."""
    return with_id({"text": text})


def chat_row(question: str, answer: str) -> Row:
    """Return a conversational row of one user message and its answer."""
    return with_id(
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    )


def identity(row: Row) -> str:
    """Return what makes two rows the same question, white space and case aside: a text, or a prompt without answer."""
    parts = [row["text"]] if row.get("text") is not None else [m["role"] + m["content"] for m in row["prompt"]]
    return hashlib.sha256(" ".join(" ".join(parts).lower().split()).encode()).hexdigest()
