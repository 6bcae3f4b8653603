"""The section on provenance: what the page was made of, on which machines, by which commands, from which files."""

from collections.abc import Sequence

from qad.report.bench_record import BenchRecord
from qad.report.blocks import Group, Section, Table
from qad.report.eval_record import EvalRecord
from qad.report.numerals import NONE, count_of, gibibytes, megabytes
from qad.report.reading import Record, of_kind
from qad.report.run_record import RunRecord, run_names
from qad.report.source import Machine, Provenance, Source
from qad.report.verify_record import VerifyRecord

ANCHOR = "provenance"


def _made(records: Sequence[Record]) -> list[tuple[Source, Provenance]]:
    """Return the records that say by what they were made."""
    return [
        (record.source, record.made)
        for record in records
        if not isinstance(record, RunRecord) and record.made is not None
    ]


def machines(records: Sequence[Record]) -> list[Machine]:
    """Return the machines that measured, each once."""
    return list(dict.fromkeys(made.machine for _, made in _made(records)))


def section(records: Sequence[Record]) -> Section:
    """Return the section."""
    made = Section(
        ANCHOR,
        "Sources",
        "The page holds no figure that is not in these files. Figures of several machines stand apart.",
    )
    made.tables.append(
        Table(
            "Read for this page",
            ("file or folder", "what", "SHA-256 (of a run: its recipe)"),
            [Group("", [[record.source.path, record.source.kind, record.source.sha256] for record in records])],
            words=3,
        )
    )
    found = machines(records)
    if found:
        made.tables.append(
            Table(
                "Machines",
                ("name", "processor", "cores", "memory", "system", "instruction sets"),
                [
                    Group(
                        "",
                        [
                            [
                                one.node,
                                one.processor,
                                str(one.cores),
                                gibibytes(one.memory),
                                one.system,
                                ", ".join(one.instruction_sets) or "–",
                            ]
                            for one in found
                        ],
                    )
                ],
                words=6,
            )
        )
    commands = [[source.name, by.command, by.when, by.machine.node] for source, by in _made(records)]
    if commands:
        made.tables.append(Table("Commands", ("record", "command", "when", "machine"), [Group("", commands)], words=4))
    _files(made, records)
    _versions(made, records)
    _runs(made, of_kind(records, RunRecord))
    return made


def _files(made: Section, records: Sequence[Record]) -> None:
    groups = [
        Group(record.source.name, [[one.file, one.sha256, megabytes(one.bytes)] for one in record.files])
        for record in of_kind(records, BenchRecord)
        if record.files
    ]
    for record in of_kind(records, EvalRecord):
        hashes = dict.fromkeys((row.file, row.sha256) for row in record.rows if row.sha256 is not None)
        if hashes:
            groups.append(Group(record.source.name, [[file, sha256, NONE] for file, sha256 in hashes]))
    if groups:
        made.tables.append(Table("Measured files", ("file", "SHA-256", "MB"), groups, words=2))


def _versions(section: Section, records: Sequence[Record]) -> None:
    told = {
        source.path: ", ".join(f"{name} {value}" for name, value in made.versions.items())
        for source, made in _made(records)
    }
    # Older proofs tell that of qad alone.
    told = {record.source.path: f"qad {record.version}" for record in of_kind(records, VerifyRecord)} | told
    rows = [[record.source.name, told[record.source.path]] for record in records if record.source.path in told]
    if rows:
        section.tables.append(Table("Versions", ("record", "versions"), [Group("", rows)], words=2))


def _runs(made: Section, runs: Sequence[RunRecord]) -> None:
    if not runs:
        return
    names = run_names(runs)
    made.tables.append(
        Table(
            "Artifacts",
            ("run", "tensors on each grid", "run hash"),
            [
                Group(
                    "",
                    [
                        [
                            names[run.source.path],
                            ", ".join(f"{grid} {count_of(number, 'tensor')}" for grid, number in run.grids.items())
                            or "–",
                            run.run_hash or "–",
                        ]
                        for run in runs
                    ],
                )
            ],
            words=3,
        )
    )
    fields = list(dict.fromkeys(name for run in runs for name in run.recipe))
    made.tables.append(
        Table(
            "Recipes",
            ("option", *(names[run.source.path] for run in runs)),
            [Group("", [[name, *(run.recipe.get(name, "–") for run in runs)] for name in fields])],
            words=1 + len(runs),
            folded=True,
        )
    )
