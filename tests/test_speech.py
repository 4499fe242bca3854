"""Reading speech, pairs and texts for encoder-decoders, prompts, and comparing what is written word
by word.
"""

import json
import wave

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

from lrkv_convert import LrkvError
from lrkv_convert.evaluate.words import align, words
from lrkv_convert.examples.pairs import Pair, read_pairs, spread
from lrkv_convert.examples.reader import Reader
from lrkv_convert.examples.speech import RATE, read_speech, read_wav
from lrkv_convert.families import FAMILIES


def write_wav(file, samples: torch.Tensor, rate: int = RATE, channels: int = 1, width: int = 2):
    with wave.open(str(file), "wb") as sound:
        sound.setparams((channels, width, rate, 0, "NONE", ""))
        sound.writeframes((samples * 32767).to(torch.int16).numpy().tobytes())
    return file


def tone(seconds: float, rate: int = RATE) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(int(seconds * rate)) / rate)


class TestSound:
    def test_samples_come_back(self, tmp_path):
        heard = read_wav(write_wav(tmp_path / "a.wav", tone(0.1)))
        assert heard.dtype == torch.float32 and (heard - tone(0.1)).abs().max() < 1e-4

    def test_other_rates_are_resampled(self, tmp_path):
        heard = read_wav(write_wav(tmp_path / "a.wav", tone(0.5, 22050), rate=22050))
        assert len(heard) == RATE // 2 and (heard - tone(0.5))[200:-200].abs().max() < 0.01

    @pytest.mark.parametrize("more", [dict(channels=2), dict(width=1), dict(width=4)])
    def test_other_kinds_are_refused_with_the_command_that_helps(self, tmp_path, more):
        with pytest.raises(LrkvError, match="not one channel of 16 bits") as refusal:
            read_wav(write_wav(tmp_path / "a.wav", tone(0.1), **more))
        assert "ffmpeg" in refusal.value.hint and "a.wav" in refusal.value.message

    def test_what_is_no_sound(self, tmp_path):
        (tmp_path / "a.wav").write_bytes(b"RIFF, or so it says")
        with pytest.raises(LrkvError, match="cannot read a.wav"):
            read_wav(tmp_path / "a.wav")
        with pytest.raises(LrkvError, match="no sound"):
            read_wav(write_wav(tmp_path / "b.wav", tone(0)))

    def test_transcripts_beside_and_in_a_table(self, tmp_path):
        for name in "abc":
            write_wav(tmp_path / f"{name}.wav", tone(0.1))
        (tmp_path / "a.txt").write_text("beside\n")
        (tmp_path / "transcripts.tsv").write_text("b.wav\tin the table\n")
        assert [(e.name, e.target) for e in read_speech(str(tmp_path)).examples] == [
            ("a.wav", "beside"),
            ("b.wav", "in the table"),
            ("c.wav", None),
        ]
        (tmp_path / "transcripts.tsv").write_text("b.wav in the table\n")
        with pytest.raises(LrkvError, match="no transcript after"):
            read_speech(str(tmp_path))

    def test_a_folder_without_sound(self, tmp_path):
        for place in (tmp_path, tmp_path / "none"):
            with pytest.raises(LrkvError, match="no folder of .wav files"):
                read_speech(str(place))

    def test_hashes_follow_sound_and_words(self, tmp_path):
        write_wav(tmp_path / "a.wav", tone(0.1))
        before = read_speech(str(tmp_path)).sha256
        (tmp_path / "a.txt").write_text("words")
        assert read_speech(str(tmp_path)).sha256 != before


class TestPairs:
    def test_lines(self, tmp_path):
        file = tmp_path / "p.jsonl"
        file.write_text(
            json.dumps({"source": "one", "target": "uno"})
            + "\n\n"
            + json.dumps({"source": "two"})
            + "\n"
        )
        assert [(e.name, e.source, e.target) for e in read_pairs(str(file)).examples] == [
            ("p.jsonl:1", "one", "uno"),
            ("p.jsonl:3", "two", None),
        ]

    @pytest.mark.parametrize(
        "line", ["{", '["a"]', '{"target": "x"}', '{"source": ""}', '{"source": "a", "target": 3}']
    )
    def test_broken_lines_are_named(self, tmp_path, line):
        file = tmp_path / "p.jsonl"
        file.write_text(json.dumps({"source": "one"}) + "\n" + line + "\n")
        with pytest.raises(LrkvError, match="line 2"):
            read_pairs(str(file))

    def test_paragraphs_of_a_text(self, tmp_path):
        (tmp_path / "t.txt").write_text(
            "Title\n\nA paragraph of\ntwo lines.\n\n\nAnd then one more.\n"
        )
        assert [e.source for e in read_pairs(str(tmp_path / "t.txt")).examples] == [
            "A paragraph of two lines.",
            "And then one more.",
        ]

    def test_speech_is_no_text(self, tmp_path):
        (tmp_path / "a.WAV").touch()
        with pytest.raises(LrkvError, match="folder of speech"):
            read_pairs(str(tmp_path))

    def test_nothing_to_read(self, tmp_path):
        for name in ("t.txt", "p.jsonl"):
            (tmp_path / name).write_text("\n")
            with pytest.raises(LrkvError, match="holds nothing to read"):
                read_pairs(str(tmp_path / name))

    def test_spread(self):
        assert (
            spread([10] * 8, 40) == [0, 2, 5, 7]
            and spread([10] * 3, 1000) == [0, 1, 2]
            and spread([10] * 3, 1) == [0]
        )


class TestReader:
    def reader(self, tmp_path, **generation):
        WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path)
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|notimestamps|>"]})
        config = WhisperConfig(
            vocab_size=260, eos_token_id=257, decoder_start_token_id=256, max_target_positions=80
        )
        return Reader(
            tmp_path,
            FAMILIES["whisper"],
            tokenizer,
            config,
            GenerationConfig(decoder_start_token_id=256, eos_token_id=257, **generation),
        )

    def test_a_target_is_prompt_text_and_end(self, tmp_path):
        reader = self.reader(tmp_path)
        [prompt] = reader.prompts([torch.zeros(1, 8, 100)], None)
        sequence = reader.target("two words", prompt)
        assert (
            prompt == [256, reader.tokenizer.convert_tokens_to_ids("<|notimestamps|>")]
            and sequence[:2].tolist() == prompt
            and sequence[-1] == 257
        )
        assert reader.words(sequence) == "two words"

    def test_multilingual_models_say_what_they_hear(self, tmp_path):
        reader = self.reader(
            tmp_path,
            lang_to_id={"<|de|>": 11, "<|fr|>": 12},
            task_to_id={"transcribe": 13, "translate": 14},
        )

        class Hears:
            device, dtype = torch.device("cpu"), torch.float32
            detect_language = staticmethod(
                lambda input_features: torch.tensor([11 if input_features.mean() > 0 else 12])
            )

        first, second = reader.prompts([torch.ones(1, 8, 100), -torch.ones(1, 8, 100)], Hears)
        assert first == [256, 11, 13, first[-1]] and second == [256, 12, 13, first[-1]]

    def test_long_recordings_are_refused(self, tmp_path):
        with pytest.raises(LrkvError, match="2 s long, and the model hears 1 s at a time"):
            self.reader(tmp_path).source(Pair("a.wav", tone(2)))

    def test_text_is_no_speech(self, tmp_path):
        with pytest.raises(LrkvError, match="reads speech, and p.jsonl:1 is text"):
            self.reader(tmp_path).source(Pair("p.jsonl:1", "text"))


class TestWords:
    def test_small_letters_without_punctuation(self):
        assert words("It's “well-known”, Mr. Smith: 3 o’clock!") == [
            "it's",
            "well-known",
            "mr",
            "smith",
            "3",
            "o'clock",
        ]

    @pytest.mark.parametrize(
        "first, second, same, edits",
        [
            ("a b c", "A, b. c!", 3, 0),
            ("a b c", "a x c", 2, 1),
            ("a b c", "a c", 2, 1),
            ("a b c", "a b b c", 3, 1),
            ("a b", "", 0, 2),
            ("", "a", 0, 1),
            ("a b c d", "b c d a", 3, 2),
            ("a b", "c d", 0, 2),
        ],
    )
    def test_the_fewest_edits_and_then_the_most_same_words(self, first, second, same, edits):
        found = align(first, second)
        assert (found.same, found.edits) == (same, edits)

    def test_rates(self):
        found = align("a b c d", "a b c") + align("a", "a b c d")
        assert (
            found.same_share == 4 / 7
            and found.error_rate == 4 / 5
            and align("", "").same_share is None
            and align("", "a").error_rate is None
        )
