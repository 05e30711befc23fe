"""Make calibration and evaluation inputs of a Whisper model from synthetic speech.

    python benchmarks/make_speech_inputs.py TOKENIZER_JSON CALIBRATION.safetensors EVALUATION.safetensors

Sentences come from the bundled calibration text, spoken by espeak-ng (Debian package; also needs `scipy`) in
several voices and speeds, resampled to 16 kHz, and turned into log-mel features. The two sets share no sentence. Each
file holds `input_features` (samples, 80, 3000) and `decoder_input_ids` and `labels` (samples, length); -100 marks
positions that are not scored: the task tokens and the padding.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.signal import resample_poly
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor

from whit.data.corpora import bundled_corpora
from whit.evaluation.tokens import IGNORED

RATE = 16_000
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
SPEEDS = (140, 155, 170)


def sentences() -> list[str]:
    """Plain sentences of 40 to 160 characters, one of each document, in the order of the text."""
    found = []
    for document in bundled_corpora()["mix"].documents():
        if document.startswith("Question:"):
            continue
        for sentence in re.split(r"(?<=[.!?])\s", document)[1:-1]:
            if 40 <= len(sentence) <= 160 and re.fullmatch(r"[A-Z][A-Za-z ,;'-]+[.!?]", sentence):
                found.append(sentence)
                break
    return list(dict.fromkeys(found))


def speak(text: str, voice: str, speed: int) -> np.ndarray:
    """The text as float32 sound at 16 kHz, in [-1, 1]."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", text]
    sound = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(sound)) as file:
        rate = file.getframerate()
        # espeak-ng writes a stream header whose length is not known: read what is there.
        samples = np.frombuffer(sound[44:], dtype="<i2").astype(np.float32) / 32768
    factor = np.gcd(RATE, rate)
    return np.asarray(resample_poly(samples, RATE // factor, rate // factor), dtype=np.float32)


def make(texts: list[str], tokenizer: Tokenizer, path: Path) -> None:
    """Write one file."""
    extractor = WhisperFeatureExtractor()
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("startoftranscript", "notimestamps", "endoftext")}
    prompt = [ids["startoftranscript"], ids["notimestamps"]]
    features, rows = [], []
    for index, text in enumerate(texts):
        sound = speak(text, VOICES[index % len(VOICES)], SPEEDS[index % len(SPEEDS)])
        features.append(torch.from_numpy(extractor(sound, sampling_rate=RATE).input_features[0]))
        rows.append(tokenizer.encode(" " + text, add_special_tokens=False).ids)
    length = max(map(len, rows)) + len(prompt)
    inputs = torch.full((len(rows), length), ids["endoftext"], dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        inputs[row, : len(prompt) + len(tokens)] = torch.tensor(prompt + tokens)
        labels[row, len(prompt) - 1 : len(prompt) + len(tokens)] = torch.tensor([*tokens, ids["endoftext"]])
    tensors = {"input_features": torch.stack(features).contiguous(), "decoder_input_ids": inputs, "labels": labels}
    save_file(tensors, path)
    print(path, {name: tuple(item.shape) for name, item in tensors.items()})


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--calibration-clips", type=int, default=48)
    parser.add_argument("--evaluation-clips", type=int, default=24)
    options = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is missing: apt-get install espeak-ng")
    texts = sentences()
    first, second = options.calibration_clips, options.evaluation_clips
    if len(texts) < first + second:
        parser.error(f"there are {len(texts)} sentences, {first + second} clips were asked for")
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    make(texts[:first], tokenizer, options.calibration)
    make(texts[first : first + second], tokenizer, options.evaluation)


if __name__ == "__main__":
    main()
