"""What several verbs of the command line take."""

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[Path, typer.Argument(help="Run folder, as made by `qad train` or `qad quantize`.")]
ModelArgument = Annotated[
    Path,
    typer.Argument(help="Exported file or folder, run, or a server: http://host:8000/v1, #MODEL if it has several."),
]
BitsOption = Annotated[
    int | None, typer.Option(help="4 or 8: the portable grid of the linear layers.", show_default="4")
]
GridOption = Annotated[
    str | None,
    typer.Option(
        help="Any grid for the linear layers, such as q4_0, q5_k or int4_g128 (embedding and head get at least 8 bits)."
    ),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        help="Mixture of grids: q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k; or a JSON file of name patterns and grids or "
        '"keep", of which the first that matches counts, and --grid or --bits where none does.'
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        help="Stored bits per quantized weight, embedding and head included: each tensor's grid is chosen by what its "
        "rounding costs in KL.",
        min=1.0,
    ),
]
FormatsOption = Annotated[
    list[str] | None,
    typer.Option(help="Format whose grids --budget chooses among; may be repeated.", show_default="gguf"),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="JSONL or Parquet file of `text` or `prompt`/`completion` rows, or a hub data set id; may be repeated.",
        show_default="worked problems, and text sampled from the teacher",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in -o with the options it has, or start it with those given.")
]
# llama.cpp knows no more than 512, and other runtimes crash where threads cannot be made.
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads; by default the free physical cores.", min=1, max=512)
]
