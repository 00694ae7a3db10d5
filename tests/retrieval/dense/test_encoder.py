"""Encoders: the exact reference recipe of e5, the prompts of each family, and fingerprints."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from tests.support.encoders import minilm, needs_minilm, save_random_bert
from trl_search.common.errors import UserError
from trl_search.retrieval import load_retriever
from trl_search.retrieval.dense.encoder import Encoder, load_encoder
from trl_search.retrieval.dense.fingerprint import refuse_other_encoder
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage

TEXTS = [
    "lantern",
    '"Orlune"\nOrlune is a harbour town in Vesk, a country of many harbours.',
    "Who founded the harbour town? " * 40,  # longer than 256 tokens
    "كتاب 灯 \U0001f30a",
    "",
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_random_bert(folder / "e5-base-v2")
    for name in ("bge-base-en-v1.5", "bge-large-zh", "nobody-base", "bge-m3"):
        shutil.copytree(folder / "e5-base-v2", folder / name)
    return folder


@torch.no_grad()
def reference(folder: Path, texts: list[str], *, pooling: str, max_length: int) -> np.ndarray:
    """The e5 encoder of common retrieval servers, written with plain transformers for one padded batch."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, max_length=max_length, padding=True, truncation=True, return_tensors="pt")
    hidden_NTD = model(**batch, return_dict=True).last_hidden_state
    if pooling == "mean":
        mask_NT = batch["attention_mask"]
        summed_ND = hidden_NTD.masked_fill(~mask_NT[..., None].bool(), 0.0).sum(dim=1)
        pooled_ND = summed_ND / mask_NT.sum(dim=1)[..., None]
    else:
        pooled_ND = hidden_NTD[:, 0]
    normal: np.ndarray = torch.nn.functional.normalize(pooled_ND, dim=-1).numpy()
    return normal


def test_e5_equals_the_reference_recipe(checkpoints: Path) -> None:
    encoder = load_encoder(checkpoints / "e5-base-v2", device="cpu")
    for encode, prompt in ((encoder.encode_queries, "query: "), (encoder.encode_passages, "passage: ")):
        expected = reference(
            checkpoints / "e5-base-v2", [prompt + text for text in TEXTS], pooling="mean", max_length=256
        )
        for together in (1, 2, 64):
            parts = [encode(TEXTS[start : start + together]) for start in range(0, len(TEXTS), together)]
            got = np.concatenate(parts)
            assert got.dtype == np.float32 and np.abs(got - expected).max() < 1e-6
    assert np.abs(encoder.encode_passages(TEXTS, batch_size=2) - encoder.encode_passages(TEXTS)).max() < 1e-6
    # If all vectors of this model were alike, the test would not notice a missing prefix or another length.
    assert np.abs(encoder.encode_queries(TEXTS) - encoder.encode_passages(TEXTS)).max() > 0.01
    longer = reference(checkpoints / "e5-base-v2", [f"query: {TEXTS[2]}"], pooling="mean", max_length=512)
    assert np.abs(encoder.encode_queries([TEXTS[2]]) - longer).max() > 1e-3


def test_bge_has_a_prompt_only_for_queries_and_pools_the_first_token(checkpoints: Path) -> None:
    encoder = load_encoder(checkpoints / "bge-base-en-v1.5", device="cpu")
    prompt = "Represent this sentence for searching relevant passages: "
    folder = checkpoints / "bge-base-en-v1.5"
    expected = reference(folder, [prompt + text for text in TEXTS], pooling="cls", max_length=512)
    assert np.abs(encoder.encode_queries(TEXTS) - expected).max() < 1e-6
    expected = reference(folder, TEXTS, pooling="cls", max_length=512)
    assert np.abs(encoder.encode_passages(TEXTS) - expected).max() < 1e-6


@needs_minilm
def test_a_sentence_transformers_model_is_used_as_its_files_say() -> None:
    from sentence_transformers import SentenceTransformer

    encoder, model = load_encoder(minilm(), device="cpu"), SentenceTransformer(minilm(), device="cpu")
    expected = model.encode(TEXTS)
    for got in (encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)):
        assert np.abs(got - expected).max() < 1e-6
    print_ = encoder.fingerprint
    assert (print_.max_length, print_.modules, print_.dim) == (256, "Transformer + Pooling(mean) + Normalize", 384)
    asked, *found = encoder.encode_queries(["where was she born?", "Her birthplace is Orlune.", "The price of tin."])
    assert asked @ found[0] > asked @ found[1] + 0.2


def test_settings_missing_from_a_sentence_transformers_folder_come_from_the_family(checkpoints: Path) -> None:
    plain = load_encoder(checkpoints / "e5-base-v2", device="cpu")
    plain.model.prompts = {}
    plain.model.max_seq_length = 512
    plain.model.save(str(checkpoints / "st" / "e5-base-v2"))
    plain.model.max_seq_length = 256
    packed = load_encoder(checkpoints / "st" / "e5-base-v2", device="cpu")
    assert packed.fingerprint.differences(plain.fingerprint) == []
    assert np.array_equal(packed.encode_queries(TEXTS), plain.encode_queries(TEXTS))
    asked = load_encoder(checkpoints / "st" / "e5-base-v2", device="cpu", max_length=128, query_prompt="ask: ")
    assert asked.fingerprint.differences(plain.fingerprint) == [
        "query_prompt is 'ask: ', not 'query: '",
        "max_length is 128, not 256",
    ]


def test_a_default_prompt_is_not_used_for_passages(checkpoints: Path) -> None:
    plain = load_encoder(checkpoints / "e5-base-v2", device="cpu", query_prompt="", passage_prompt="")
    plain.model.prompts, plain.model.default_prompt_name = {"query": "query: ", "passage": ""}, "query"
    plain.model.save(str(checkpoints / "st" / "asks-by-default"))
    encoder = load_encoder(checkpoints / "st" / "asks-by-default", device="cpu")
    assert (encoder.fingerprint.query_prompt, encoder.fingerprint.passage_prompt) == ("query: ", "")
    plain.model.default_prompt_name = None
    passages, queries, expected = (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        for vectors in (encoder.encode_passages(TEXTS), encoder.encode_queries(TEXTS), plain.encode_passages(TEXTS))
    )
    assert np.allclose(passages, expected, atol=1e-5) and not np.allclose(queries, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "pooling", "prompt", "max_length"),
    [
        ("e5-base-v2", "mean", "query: ", 256),
        ("bge-base-en-v1.5", "cls", "Represent this sentence for searching relevant passages: ", 512),
        ("bge-large-zh", "cls", "为这个句子生成表示以用于检索相关文章：", 512),
        ("bge-m3", "cls", "", 512),  # the positions of this checkpoint, less than the family's 8192
    ],
)
def test_families_are_recognized_by_name(
    checkpoints: Path, name: str, pooling: str, prompt: str, max_length: int
) -> None:
    found = load_encoder(checkpoints / name, device="cpu").fingerprint
    assert (found.modules, found.query_prompt, found.max_length, found.normalize) == (
        f"Transformer + Pooling({pooling})",
        prompt,
        max_length,
        True,
    )


def test_a_plain_checkpoint_of_an_unknown_family_needs_a_pooling(checkpoints: Path) -> None:
    with pytest.raises(UserError, match=r"nobody-base.*pass pooling, one of mean, cls"):
        load_encoder(checkpoints / "nobody-base", device="cpu")
    found = load_encoder(checkpoints / "nobody-base", device="cpu", pooling="cls", normalize=False)
    assert (found.fingerprint.query_prompt, found.fingerprint.normalize) == ("", False)
    assert np.abs(np.linalg.norm(found.encode_queries(["lantern"])) - 1) > 0.01


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere", {}, "no encoder folder"),
        ("e5-base-v2", {"dtype": "float61"}, "did you mean 'float16'"),
        ("e5-base-v2", {"pooling": "men"}, "did you mean 'mean'"),
        ("e5-base-v2", {"max_length": 1000}, "positions for 512 tokens"),
    ],
)
def test_wrong_options_are_refused(checkpoints: Path, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(checkpoints / name, device="cpu", **options)  # type: ignore[arg-type]


def test_an_encoder_without_its_tokenizer_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(checkpoints / "e5-base-v2" / file, tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):  # every word would be unknown
        load_encoder(tmp_path, device="cpu", pooling="mean")


def test_a_missing_encoder_is_reported_in_one_line() -> None:
    with pytest.raises(UserError, match=r"nobody/e5-base-v9 is not on this machine, [^\n]*: give a path, or [^\n]*$"):
        load_encoder("nobody/e5-base-v9", device="cpu")


@needs_minilm
def test_the_pooling_of_a_folder_is_not_overridden() -> None:
    with pytest.raises(UserError, match="defines its own pooling"):
        load_encoder(minilm(), pooling="cls")
    with pytest.raises(UserError, match="normalises by itself"):
        load_encoder(minilm(), normalize=False)


# The identity of encoders


def test_the_fingerprint_depends_on_the_weights_and_not_on_the_folder(checkpoints: Path) -> None:
    encoder = load_encoder(checkpoints / "e5-base-v2", device="cpu")
    shutil.copytree(checkpoints / "e5-base-v2", checkpoints / "moved" / "e5-base-v2")
    moved = load_encoder(checkpoints / "moved" / "e5-base-v2", device="cpu", dtype="bfloat16")
    refuse_other_encoder(moved.fingerprint, encoder.fingerprint, "indexes/x")
    save_random_bert(checkpoints / "other" / "e5-base-v2", seed=1)
    other = load_encoder(checkpoints / "other" / "e5-base-v2", device="cpu")
    with pytest.raises(UserError, match=r"is not the one indexes/x was built with .*: its weights is"):
        refuse_other_encoder(other.fingerprint, encoder.fingerprint, "indexes/x")


def test_the_fingerprint_depends_on_prompt_and_length(checkpoints: Path) -> None:
    encoder = load_encoder(checkpoints / "e5-base-v2", device="cpu")
    changed = Encoder(None, replace(encoder.fingerprint, passage_prompt="", dim=768))
    with pytest.raises(UserError, match="its passage_prompt is '', not 'passage: ', dim is 768, not 32"):
        refuse_other_encoder(changed.fingerprint, encoder.fingerprint, "indexes/x")


# The texts that are encoded


def test_a_text_of_100_000_characters_costs_no_more_than_its_first_tokens(checkpoints: Path) -> None:
    encoder = load_encoder(checkpoints / "e5-base-v2", device="cpu")
    long, cut = "harbour town " * 80_000, "harbour town " * 200
    start = time.process_time()
    assert np.abs(encoder.encode_queries([long]) - encoder.encode_queries([cut])).max() < 1e-6
    assert time.process_time() - start < 5  # tokenizing a million characters takes minutes


def test_strange_texts_are_encoded(checkpoints: Path) -> None:
    encoder = load_encoder(checkpoints / "e5-base-v2", device="cpu")
    vectors = encoder.encode_queries(["Orlune\ud800", "\0", "", "x" * 100_000])
    assert vectors.shape == (4, 32) and np.isfinite(vectors).all()
    assert encoder.encode_queries([]).shape == (0, 32)


def test_threads_get_what_one_thread_gets(checkpoints: Path) -> None:
    encoder = load_encoder(checkpoints / "e5-base-v2", device="cpu")
    expected = [encoder.encode_queries([text]) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        for number, got in enumerate(pool.map(lambda n: encoder.encode_queries([TEXTS[n % 5]]), range(40))):
            assert np.array_equal(got, expected[number % 5])


# Two encoders, named prompts, positions, code


def test_queries_may_have_another_encoder(checkpoints: Path, tmp_path: Path) -> None:
    save_random_bert(tmp_path / "asks", seed=1)
    options = {"device": "cpu", "pooling": "cls", "normalize": False}
    passages, asks = checkpoints / "nobody-base", tmp_path / "asks"
    both = load_encoder(passages, query_encoder=str(asks), **options)
    ours, theirs = load_encoder(passages, **options), load_encoder(asks, **options)
    assert np.array_equal(both.encode_passages(TEXTS), ours.encode_passages(TEXTS))
    assert np.array_equal(both.encode_queries(TEXTS), theirs.encode_queries(TEXTS))
    (difference,) = both.fingerprint.differences(ours.fingerprint)
    assert difference.startswith("query_weights is")


def test_an_index_of_two_encoders_is_searched_with_both(checkpoints: Path, tmp_path: Path) -> None:
    save_random_bert(tmp_path / "asks", seed=1)
    names = {"encoder": str(checkpoints / "nobody-base"), "query_encoder": str(tmp_path / "asks")}
    world = [Passage(str(row), "", text) for row, text in enumerate(TEXTS[:3])]
    build_index(world, tmp_path / "index", "dense", pooling="cls", normalize=False, **names)
    found = load_retriever("dense", index=tmp_path / "index", device="cpu").search(["lantern"], k=3)[0]
    encoder = load_encoder(names["encoder"], query_encoder=names["query_encoder"], pooling="cls", normalize=False)
    scores = encoder.encode_queries(["lantern"]) @ encoder.encode_passages(TEXTS[:3]).T
    assert [passage.score for passage in found] == pytest.approx(sorted(scores[0], reverse=True), abs=1e-4)


def test_a_prompt_is_chosen_by_its_name(checkpoints: Path, tmp_path: Path) -> None:
    plain = load_encoder(checkpoints / "nobody-base", device="cpu", pooling="mean")
    plain.model.prompts = {"s2p_query": "Given a search, ", "s2s_query": "Given a text, ", "document": "text: "}
    plain.model.save(str(tmp_path / "stella"))
    with pytest.raises(
        UserError, match="none is named 'query': pass query_prompt, one of s2p_query, s2s_query, or ''"
    ):
        load_encoder(tmp_path / "stella", device="cpu")
    for given, prompt in (("s2p_query", "Given a search, "), ("", ""), ("Ask: ", "Ask: ")):
        found = load_encoder(tmp_path / "stella", device="cpu", query_prompt=given).fingerprint
        assert (found.query_prompt, found.passage_prompt) == (prompt, "text: ")


def test_roberta_positions_reserved_for_padding_are_not_used(tmp_path: Path) -> None:
    save_random_bert(tmp_path / "roberta", positions=66)
    config = RobertaConfig.from_pretrained(tmp_path / "roberta", pad_token_id=1, max_position_embeddings=66)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    encoder = load_encoder(tmp_path / "roberta", device="cpu", pooling="mean")
    assert encoder.fingerprint.max_length == 64
    assert encoder.encode_passages(["harbour town " * 100]).shape == (1, 32)
    with pytest.raises(UserError, match="positions for 64 tokens"):
        load_encoder(tmp_path / "roberta", device="cpu", pooling="mean", max_length=65)


@pytest.mark.parametrize("packed", [False, True])
def test_code_in_a_checkpoint_is_not_run_and_there_is_no_prompt(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(checkpoints / "nobody-base", folder)
    if packed:
        load_encoder(folder, device="cpu", pooling="mean").model.save(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(
        UserError, match=r"needs Python code from its checkpoint, which is not run by default.*trust_remote_code=True"
    ):
        load_encoder(folder, device="cpu", pooling=None if packed else "mean")
    assert not (tmp_path / "ran").exists()
