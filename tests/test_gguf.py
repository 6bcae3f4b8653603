"""GGUF export: bit-exact through an independent decoder, right metadata, one clear error per bad input."""

import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from qad import export
from qad.architectures import (
    SPLITTERS,
    detect_splitter,
    get_architecture,
    head_dim,
    key_value_heads,
    rope_parameters,
)
from qad.errors import UserError
from qad.export import Exporter
from qad.export import gguf as gguf_module
from qad.gguf_check import check_gguf, read_header
from qad.verify import verify
from tests.helpers_exports import Exported, exports_made_once
from tests.helpers_models import MODELS, TOKENIZERS, make_artifact, make_tokenizer

# The assignment makes the type checker hold the module to the protocol.
EXPORTER: Exporter = gguf_module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a maker of exported cases, each made once."""
    return exports_made_once(EXPORTER, "model.gguf", tmp_path_factory)


@pytest.mark.parametrize("case", MODELS)
def test_every_code_and_scale_survives(case: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, case, extreme=True)
    file = tmp_path / "model.gguf"
    EXPORTER.write(artifact, file)
    result = verify(tmp_path, file)
    assert result.ok, result.mismatches
    assert (result.exact, result.kept_exact) == (len(artifact.grids), len(artifact.kept))
    assert result.exact > 0
    assert result.file_run_hash == artifact.run_hash


@pytest.mark.parametrize("case", MODELS)
def test_model_metadata(case: str, exported: Exported) -> None:
    artifact, file = exported(case)
    config = artifact.config
    header = read_header(file)
    architecture = get_architecture(config).gguf
    wanted = {
        "block_count": config["num_hidden_layers"],
        "context_length": 300 if case in ("mistral-window", "phi3") else config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": key_value_heads(config),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": pytest.approx(config["rms_norm_eps"]),
        "rope.dimension_count": 24 if case == "phi3-longrope" else head_dim(config),
        "rope.freq_base": pytest.approx(rope_parameters(config)["rope_theta"]),
    }
    for key, value in wanted.items():
        assert header.metadata[f"{architecture}.{key}"] == value, key
    assert header.metadata["general.architecture"] == architecture
    assert header.metadata["general.file_type"] == {4: 2, 8: 7}[MODELS[case].bits]
    assert header.metadata["qad.run_hash"] == artifact.run_hash
    assert json.loads(header.metadata["qad.recipe"]) == artifact.recipe
    assert ("output.weight" in header.tensors) is not artifact.tied_head
    assert header.tensors["token_embd.weight"].type.name == "Q8_0"
    assert header.tensors["blk.0.ffn_up.weight"].type.name == {4: "Q4_0", 8: "Q8_0"}[MODELS[case].bits]
    assert header.tensors["blk.1.attn_norm.weight"].type.name == "F32"


@pytest.mark.parametrize("case", MODELS)
def test_tokenizer_metadata(case: str, exported: Exported) -> None:
    artifact, file = exported(case)
    metadata = read_header(file).metadata
    family = TOKENIZERS[MODELS[case].tokenizer]
    tokenizer = make_tokenizer(MODELS[case].tokenizer)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == artifact.config["vocab_size"]
    assert metadata["tokenizer.ggml.pre"] == family.splitter
    assert metadata["tokenizer.ggml.add_bos_token"] is family.adds_bos
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert metadata["tokenizer.chat_template"] == family.template
    if family.bos:
        assert tokens[metadata["tokenizer.ggml.bos_token_id"]] == family.bos
    for text in family.special:
        wanted = TokenType.UNKNOWN if text == "<unk>" else TokenType.CONTROL
        assert types[tokens.index(text)] == wanted, text
    for text in family.plain:
        wanted = TokenType.CONTROL if text.startswith("<|") else TokenType.USER_DEFINED
        wanted = wanted if text.strip("\u2581") else TokenType.NORMAL
        assert types[tokens.index(text)] == wanted, text
    for index in range(len(tokenizer), len(tokens)):
        assert (tokens[index], types[index]) == (f"[PAD{index}]", TokenType.UNUSED)
    assert len(set(tokens)) == len(tokens)


def test_padded_vocabulary_is_among_the_cases(exported: Exported) -> None:
    assert any(exported(case)[0].config["vocab_size"] > len(make_tokenizer(MODELS[case].tokenizer)) for case in MODELS)


def test_gguf_reader_agrees_with_own_header(exported: Exported) -> None:
    _, file = exported("qwen3")
    header = read_header(file)
    reader = gguf.GGUFReader(file)
    assert [tensor.name for tensor in reader.tensors] == list(header.tensors)
    for tensor in reader.tensors:
        own = header.tensors[tensor.name]
        assert (own.start, own.size, own.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)


@pytest.mark.parametrize("name", export.names())
def test_exporters_offer_what_the_protocol_asks(name: str, tmp_path: Path) -> None:
    exporter = export.get(name)
    assert exporter.GRIDS
    target = tmp_path / f"student{exporter.SUFFIX}"
    exporter.write(make_artifact(tmp_path, "llama-tied"), target)
    assert export.exporter_for(target) is exporter
    assert [other for other in export.names() if export.get(other).recognizes(target)] == [name]


@pytest.mark.parametrize("name", SPLITTERS)
def test_splitters_are_told_apart(name: str) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=SPLITTERS[name].ignore_merges))
    tokenizer.pre_tokenizer = SPLITTERS[name].build()  # type: ignore[assignment]
    assert detect_splitter(tokenizer).name == name


def test_smollm_published_form_is_recognized() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert detect_splitter(tokenizer).name == "smollm"


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param((models.BPE(), pre_tokenizers.Whitespace()), id="other splitter"),
        pytest.param((models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True)), id="leading space"),
        pytest.param((models.BPE(byte_fallback=True), None), id="byte fallback"),
        pytest.param((models.WordLevel({"a": 0}, unk_token="a"), pre_tokenizers.Whitespace()), id="word level"),
    ],
)
def test_unknown_tokenizers_are_refused(tokenizer: tuple[models.Model, pre_tokenizers.PreTokenizer | None]) -> None:
    built = Tokenizer(tokenizer[0])
    if tokenizer[1] is not None:
        built.pre_tokenizer = tokenizer[1]  # type: ignore[assignment]
    with pytest.raises(UserError, match="tokenizer"):
        detect_splitter(built)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 4096, "tie_word_embeddings": True}
    peaks = []
    for layers in (2, 10):
        artifact = make_artifact(tmp_path / str(layers), "llama-tied", num_hidden_layers=layers, **sizes)
        EXPORTER.write(artifact, tmp_path / "warm.gguf")
        tracemalloc.start()
        EXPORTER.write(artifact, tmp_path / f"{layers}.gguf")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    tensor = 4096 * 192
    assert peaks[1] - peaks[0] < tensor
    assert (tmp_path / "10.gguf").stat().st_size > 10 * tensor


def test_progress_ends_at_the_whole(exported: Exported, tmp_path: Path) -> None:
    artifact, _ = exported("llama-scaled")
    seen: list[tuple[int, int]] = []
    EXPORTER.write(artifact, tmp_path / "model.gguf", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_foreign_grid_is_refused(exported: Exported, tmp_path: Path) -> None:
    artifact, _ = exported("llama-tied")
    foreign = dataclasses.replace(artifact, grids=dict.fromkeys(artifact.grids, "int3_g64"))
    with pytest.raises(UserError, match=r"cannot carry the grid int3_g64.*no format can"):
        EXPORTER.write(foreign, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"'mamba' is not supported; supported: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"vocab_size": 300}, "belongs to another model"),
    ],
)
def test_what_gguf_cannot_express_is_refused(
    changes: dict[str, object], message: str, exported: Exported, tmp_path: Path
) -> None:
    artifact, _ = exported("llama-tied")
    with pytest.raises(UserError, match=message):
        EXPORTER.write(dataclasses.replace(artifact, config=artifact.config | changes), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_missing_tokenizer(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    for file in artifact.folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        EXPORTER.write(artifact, tmp_path / "model.gguf")


def test_unknown_format_lists_the_names() -> None:
    with pytest.raises(UserError, match=r"unknown format 'ggml'; known: .*gguf"):
        export.get("ggml")
    with pytest.raises(UserError, match=r"\.gguf"):
        export.exporter_for(Path("model.bin"))


def test_full_disk_keeps_the_previous_file(small_disk: Path, exported: Exported) -> None:
    artifact, file = exported("llama-untied")
    assert file.stat().st_size > 512 * 1024
    target = small_disk / "model.gguf"
    target.write_bytes(b"the previous file")
    with pytest.raises(UserError, match="disk is full"):
        EXPORTER.write(artifact, target)
    assert target.read_bytes() == b"the previous file"
    assert list(small_disk.iterdir()) == [target]


def test_truncated_anywhere(exported: Exported, tmp_path: Path) -> None:
    _, file = exported("llama-tied")
    data = file.read_bytes()
    broken = tmp_path / "broken.gguf"
    header_end = min(tensor.start for tensor in read_header(file).tensors.values())
    lengths = {4, 7, 8, 20, 24, 100, header_end // 2, header_end - 40, header_end, len(data) // 2, len(data) - 64}
    for length in sorted(lengths):
        broken.write_bytes(data[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            check_gguf(broken)
        with pytest.raises(UserError, match="truncated or damaged"):
            EXPORTER.read(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGU", "not a GGUF file"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"x" * 32, "ends within"),
        (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"ab", 77) + b"x" * 32, "unknown value type 77"),
    ],
)
def test_what_is_no_gguf_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_gguf(file)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        check_gguf(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="a folder"):
        check_gguf(tmp_path)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_headers_end_in_the_one_error(
    exported: Exported, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    _, file = exported("llama-tied")
    data = np.frombuffer(file.read_bytes(), dtype=np.uint8).copy()
    header_end = min(tensor.start for tensor in read_header(file).tensors.values())
    for position, value in changes:
        data[position % header_end] = value
    broken = tmp_path_factory.mktemp("damaged") / "model.gguf"
    broken.write_bytes(data.tobytes())
    try:
        read_header(broken)
        list(EXPORTER.read(broken))
    except UserError:
        pass
