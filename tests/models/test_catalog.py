"""The real models of the catalogue; each test is skipped when its package is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from whit.errors import MissingDependencyError, ModelError
from whit.models import catalog
from whit.models.catalog import CATALOG, CatalogEntry, Part, locate
from whit.models.resolve import ModelReference, resolve_model
from whit.models.skeleton import build_skeleton, load_dense, materialise
from whit.models.stacks import find_stacks

STORIES = Path(__file__).parents[1] / "assets" / "stories260k"


def installed(name: str) -> ModelReference:
    try:
        return resolve_model(name)
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_default_is_in_the_catalogue():
    assert catalog.DEFAULT in CATALOG
    assert all(len(entry.sha256) == 16 and entry.licence for entry in CATALOG.values())


def test_data_packages_are_never_imported():
    for entry in CATALOG.values():
        try:
            locate(entry)
        except MissingDependencyError:
            continue
        assert not any(part.module in sys.modules for part in entry.parts)


def test_parts_are_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import hashlib

    monkeypatch.setenv("WHIT_CACHE", str(tmp_path / "cache"))
    pieces = [b"GGUF and", b" so ", b"on"]
    for index, piece in enumerate(pieces):
        (tmp_path / f"x.gguf.part{index}").write_bytes(piece)
    monkeypatch.setattr(catalog, "_find", lambda part: tmp_path / part.file)
    parts = tuple(Part("d", "1", "m", f"x.gguf.part{index}") for index in range(3))
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()[:16]
    path = locate(CatalogEntry("x", "gguf", parts, digest, "MIT", ""))
    assert path.read_bytes() == b"GGUF and so on"
    assert path.suffix == ".gguf"
    stamp = path.stat().st_mtime_ns
    assert locate(CatalogEntry("x", "gguf", parts, digest, "MIT", "")) == path
    assert path.stat().st_mtime_ns == stamp
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    path.write_bytes(b"GGUF and so of")
    with pytest.raises(ModelError, match="expected"):
        locate(CatalogEntry("x", "gguf", parts, digest, "MIT", ""))
    assert locate(CatalogEntry("x", "gguf", parts, digest, "MIT", "")) == path, "the remedy of the error works"
    (tmp_path / "x.gguf.part1").write_bytes(b" no ")
    path.unlink()
    with pytest.raises(ModelError, match="force-reinstall"):
        locate(CatalogEntry("x", "gguf", parts, digest, "MIT", ""))


def test_stories_continue_as_published():
    reference = resolve_model(STORIES)
    tokenizer = reference.load_tokenizer()
    model = load_dense(reference, torch.float32, "cpu")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        text = tokenizer.decode(
            model.generate(**prompt, do_sample=False, max_new_tokens=60)[0], skip_special_tokens=True
        )
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )


def test_default_model_streams_and_knows_paris():
    reference = installed(catalog.DEFAULT)
    assert reference.dtype is torch.float16
    assert any("Q4_1 grid" in note for note in reference.notes)
    model = build_skeleton(reference, torch.float32)
    assert len(find_stacks(model)[0].blocks) == 30
    materialise(model, "model.layers.3", reference.source, torch.float32, "cpu")
    weight = model.get_parameter("model.layers.3.mlp.down_proj.weight")
    groups = weight.detach().reshape(-1, 32)
    assert max(len(torch.unique(row)) for row in groups[:500]) <= 16  # the grid the catalogue warns of
    assert model.get_parameter("model.layers.4.mlp.down_proj.weight").is_meta


@pytest.mark.slow
def test_default_model_equals_the_reading_of_transformers():
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF weights")
    from transformers import AutoModelForCausalLM

    reference = installed(catalog.DEFAULT)
    path = locate(CATALOG[catalog.DEFAULT])
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = reference.load_tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        found = load_dense(reference, torch.float32, "cpu")(ids).logits
        assert torch.equal(found, expected(ids).logits)
    assert tokenizer.decode(found[0, -1].argmax()) == " Paris"


def test_whisper_is_converted():
    reference = installed("whisper-tiny-en")
    assert reference.dtype is torch.float16
    model = load_dense(reference, torch.float32, "cpu")
    assert [len(stack.blocks) for stack in find_stacks(model)] == [4, 4]
    tokenizer = reference.load_tokenizer()
    # What Whisper makes of silence is well known: " you", and the end.
    features = WhisperFeatureExtractor()(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt")
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])])
    assert reference.generation_config.decoder_start_token_id == ids[0, 0]
    for _ in range(2):
        with torch.no_grad():
            logits = model(**features, decoder_input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.convert_ids_to_tokens(ids[0, 2:]) == ["Ġyou", "<|endoftext|>"]


def test_minilm_sentence_similarity():
    reference = installed("minilm-l6")
    tokenizer, model = reference.load_tokenizer(), load_dense(reference, torch.float32, "cpu")
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = pooled @ pooled.T
    assert similarity[0, 1].item() == pytest.approx(0.7553, abs=1e-3)
    assert similarity[0, 2] < 0.1


def test_albert_completes_reactions():
    reference = installed("albert-smiles")
    tokenizer, model = reference.load_tokenizer(), load_dense(reference, torch.float32, "cpu")
    reaction = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
    ids = tokenizer(reaction, return_tensors="pt").input_ids
    assert tokenizer.unk_token_id not in ids
    right = 0
    for position in range(1, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, position] = tokenizer.mask_token_id
        with torch.no_grad():
            right += int(model(masked).logits[0, position].argmax() == ids[0, position])
    assert (right, ids.shape[1] - 2) == (53, 54)
