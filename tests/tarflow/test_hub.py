"""A model that is published comes back as it was, is denoised as it should be, and its card says how to use it."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects

from helpers import tarflow
from tarflow import Denoising, FlowPP, FlowPPConfig, Guidance, ImageFlow, TarFlow, cli, load_pretrained
from tarflow.pretrained import weights_digest

METADATA = {"sigma": 0.2, "denoising_steps": 2, "class_names": ["a", "b"], "guidance": {"weight": 1.5}}
FLOWPP = FlowPPConfig(image_size=4, in_channels=1, stack="squeeze channel2", filters=8, blocks_per_coupling=1)


def seeded():
    return torch.Generator().manual_seed(0)


def conditional():
    return tarflow(dtype=torch.float32, num_classes=2)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder, in which a repository is a folder for each branch; it notes what it is asked for."""
    place, asked = tmp_path / "hub", []

    def create_repo(self, repo_id, *, private, exist_ok):
        asked.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self, *, repo_id, folder_path, allow_patterns, delete_patterns, revision, create_pr, commit_message
    ):
        asked.append(("upload", revision, create_pr, self.token))
        there = [path.name for path in (place / repo_id / (revision or "main")).glob("*")]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns):
            (place / repo_id / (revision or "main") / name).unlink()
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*")]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            target = place / repo_id / (revision or "main") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, target)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def snapshot_download(repo_id, *, allow_patterns, revision="main", **options):
        asked.append(("download", options))
        return place / repo_id / revision

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(place=place, asked=asked)


@pytest.mark.parametrize("model", [conditional, lambda: FlowPP(FLOWPP)], ids=["TarFlow", "Flow++"])
def test_what_is_pushed_comes_back(hub, model):
    model = model().eval()
    model.metadata = METADATA
    assert model.push_to_hub("someone/model", license="mit") == "https://hub/someone/model"
    found, metadata = load_pretrained("someone/model")
    assert type(found) is type(model)
    assert found.config == model.config
    assert all(map(torch.equal, found.state_dict().values(), model.state_dict().values()))
    assert METADATA.items() <= metadata.items()
    assert ImageFlow.from_pretrained("someone/model").metadata == METADATA


def test_options_are_those_of_the_hub(hub):
    model = conditional()
    model.push_to_hub("someone/model", license="mit", private=True, token="secret", branch="v1", create_pr=True)
    assert hub.asked == [("create", "someone/model", True, True), ("upload", "v1", True, "secret")]
    TarFlow.from_pretrained("someone/model", revision="v1", token="secret", local_files_only=True)
    assert hub.asked[-1] == ("download", {"token": "secret", "local_files_only": True})


def test_samples_are_denoised_as_the_configuration_says(tmp_path):
    model = conditional().eval()
    model.save_pretrained(tmp_path, **METADATA)
    found, labels = TarFlow.from_pretrained(tmp_path), torch.tensor([0, 1, 1])
    noisy, denoised = (
        model.sample(3, labels, denoise_sigma=sigma, denoising=Denoising(2), generator=seeded()) for sigma in (0, 0.2)
    )
    assert torch.equal(model.sample(3, labels, generator=seeded()), noisy)
    assert torch.equal(found.sample(3, labels, generator=seeded()), denoised)
    assert torch.equal(found.sample(3, labels, denoise_sigma=0, generator=seeded()), noisy)
    assert not torch.equal(noisy, denoised)


def test_what_a_model_was_read_with_is_saved_with_it_again(tmp_path):
    conditional().save_pretrained(tmp_path / "a", **METADATA)
    TarFlow.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", sigma=0.3)
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert told[1] == told[0] | {"sigma": 0.3}


@pytest.mark.parametrize("guidance", [3, "strong", {"weight": -1}, {"strength": 2.0}])
def test_a_guidance_that_is_none_is_refused(tmp_path, guidance):
    conditional().save_pretrained(tmp_path, guidance=guidance)
    with pytest.raises(ValueError, match=r"config\.json: guidance: expected an object with fields of a Guidance"):
        TarFlow.from_pretrained(tmp_path)


def card_of(hub):
    return ModelCard.load(hub.place / "someone" / "model" / "main" / "README.md")


def test_the_card_says_what_the_model_is(hub):
    model = conditional()
    model.metadata = METADATA
    model.push_to_hub("someone/model", license="cc-by-4.0")
    card = card_of(hub)
    assert card.data.license == "cc-by-4.0"
    assert card.data.to_dict()["library_name"] == "tarflow"
    assert {"normalizing-flow", "tarflow"} <= set(card.data.tags)
    for part in ("# model\n", model.config.summary, "sigma 0.2", "Classes: a, b."):
        assert part in card.text
    assert "Scores" not in card.text


@pytest.mark.parametrize(
    ("model", "guidance", "flags"),
    [
        (conditional, {"weight": 1.5}, " --guidance 1.5"),
        (conditional, {"weight": 1.5, "schedule": "constant"}, ""),
        (conditional, None, ""),
        (lambda: tarflow(dtype=torch.float32), None, ""),
        (lambda: FlowPP(FLOWPP), None, ""),
    ],
    ids=["guided", "by another schedule", "unguided", "unconditional", "Flow++"],
)
def test_the_lines_of_the_card_draw_samples(hub, tmp_path, monkeypatch, model, guidance, flags):
    model = model()
    model.metadata = {"sigma": 0.2 if model.supports_guidance else 0.0, "guidance": guidance}
    model.push_to_hub("someone/model", license="mit")
    shell, lines = re.findall(r"```\w+\n(.*?)```", card_of(hub).text, re.DOTALL)
    names = {}
    exec(lines, names)
    assert names["images"].shape == (16, *model.config.image_shape)
    if guidance:
        assert eval(re.search(r"guidance=(.*?\))", lines)[1], names) == Guidance(**guidance)
    command = shell.splitlines()[-1]
    assert command == f"tarflow sample someone/model{flags} --out samples.png"
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split()[1:], "--device=cpu"]) == 0
    assert (tmp_path / "samples.png").exists()


@pytest.fixture
def run(tmp_path):
    """What a training run leaves, as far as it is published, and something that is not."""
    folder = tmp_path / "run"
    conditional().save_pretrained(folder, **METADATA)
    (folder / "checkpoints").mkdir()
    for name in ("samples.png", "metrics.jsonl", "checkpoints/step-00000001.pt"):
        (folder / name).write_bytes(b"0")
    return folder


def write_scores(run, digest):
    record = {
        "data": "some images",
        "weights": digest,
        "settings": {"num_images": 1000, "seed": 0},
        "scores": {"bits/dim": {"mean": 3.25, "standard_error": 0.0125}},
        "samples": {"protocol": {"samples": 2000, "guidance": "weight 1.5"}, "scores": {"Frechet distance": 7.125}},
    }
    (run / "evaluation.json").write_text(json.dumps(record))


def test_push_sends_a_model_its_samples_and_its_scores(hub, run, capsys):
    write_scores(run, weights_digest(run))
    assert cli.main(["push", str(run), "someone/model", "--license=mit"]) == 0
    assert capsys.readouterr().out == "published https://hub/someone/model\n"
    sent = hub.place / "someone" / "model" / "main"
    assert {path.name for path in sent.iterdir()} == {"config.json", "model.safetensors", "README.md", "samples.png"}
    text = card_of(hub).text
    for row in ("some images", "| bits/dim | 3.25 ± 0.013 |", "| Frechet distance | 7.125 |", "| samples | 2000 |"):
        assert row in text


@pytest.mark.parametrize("digest", ["of others", None])
def test_scores_of_other_weights_are_not_told(hub, run, digest):
    write_scores(run, digest)
    assert cli.main(["push", str(run), "someone/model", "--license=mit"]) == 0
    assert "Scores" not in card_of(hub).text


def test_a_card_that_is_there_is_left_as_it_is(hub, run):
    (run / "README.md").write_text("my words")
    assert cli.main(["push", str(run), "someone/model"]) == 0
    assert (run / "README.md").read_text() == "my words"
    assert (hub.place / "someone" / "model" / "main" / "README.md").read_text() == "my words"


def test_a_model_that_is_pushed_again_has_a_card_and_files_of_its_own(hub, run):
    write_scores(run, weights_digest(run))
    (run / "calibration.json").write_text("[]")
    assert cli.main(["push", str(run), "someone/model", "--license=mit"]) == 0
    other = conditional()
    other.save_pretrained(run, **METADATA)  # which removes the calibration of the weights before
    write_scores(run, "of others")
    assert cli.main(["push", str(run), "someone/model"]) == 0
    assert card_of(hub).data.license == "mit"
    assert "Scores" not in card_of(hub).text
    assert not (hub.place / "someone" / "model" / "main" / "calibration.json").exists()
    assert cli.main(["push", str(run), "someone/model", "--license=apache-2.0"]) == 0
    assert card_of(hub).data.license == "apache-2.0"


def test_a_card_that_somebody_has_changed_is_left_as_it_is(hub, run, capsys):
    assert cli.main(["push", str(run), "someone/model", "--license=mit"]) == 0
    changed = (run / "README.md").read_text().replace("# model", "# my model")
    (run / "README.md").write_text(changed)
    assert cli.main(["push", str(run), "someone/model", "--license=apache-2.0"]) == 1
    assert "license: expected none beside" in capsys.readouterr().err
    assert cli.main(["push", str(run), "someone/model"]) == 0
    assert (hub.place / "someone" / "model" / "main" / "README.md").read_text() == changed


def test_a_new_card_needs_a_license(hub, run, capsys):
    assert cli.main(["push", str(run), "someone/model"]) == 1
    assert capsys.readouterr().err == (
        "tarflow push: error: license: expected that of the model, such as mit, for its card; got none\n"
    )
    assert hub.asked == []


def test_a_hub_that_is_not_reached_is_an_error_of_one_line(run, monkeypatch, capsys):
    def create_repo(self, repo_id, **options):
        raise HTTPError("no route")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    assert cli.main(["push", str(run), "someone/model", "--license=mit"]) == 1
    assert capsys.readouterr().err == "tarflow push: error: someone/model: not published: no route\n"


def test_publishing_needs_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "tarflow\[hub\]"'):
        TarFlow.from_pretrained(run).push_to_hub("someone/model", license="mit")
