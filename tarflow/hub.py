"""Publishing models on the Hugging Face hub, each with a card that tells what it is, how to use it and how it scores.

:mod:`tarflow.pretrained` reads them: ``from_pretrained("owner/name")``.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decoding import calibration
from .files import atomic_write
from .guidance import Guidance
from .pretrained import weights_digest

if TYPE_CHECKING:
    from .image_flow import ImageFlow

__all__ = ["CARD", "model_card", "push"]

CARD = "README.md"
OPTIONAL = [calibration.FILE, "samples.png"]
FILES = ["config.json", "model.safetensors", CARD, *OPTIONAL]
SIGNATURE = "\n<!-- written by tarflow push, sha256 "


def push(
    model: "ImageFlow",
    folder: Path | str,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Publish a model",
) -> str:
    """Publish a folder that holds a model, and return the address of the commit.

    What is sent are its ``config.json``, ``model.safetensors``, ``calibration.json``, ``samples.png`` and the card,
    ``README.md``, which is written into the folder, unless there is one that somebody else has written or changed. Of
    a repository that has been published to before, a calibration or picture that the folder has no more is removed.

    Args:
        model: the model in the folder.
        folder: a folder of ``save_pretrained``, or of a training run.
        repo_id: ``"owner/name"``, a repository that is made where there is none.
        license: for a card that is to be written: the license of the model, such as ``"mit"``; by default that of the
            card that was written before.
        private, token, branch, create_pr, commit_message: as ``huggingface_hub.PyTorchModelHubMixin`` takes them.

    Raises:
        ValueError: a card is to be written and there is no license; there is a license beside a card that is not to be
            written; a repo_id that is none.
        ImportError: without huggingface_hub.
        OSError: the hub refuses, or is not reached.
    """
    try:
        from huggingface_hub import HfApi, ModelCard
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise ImportError('publishing a model needs huggingface_hub: pip install "tarflow[hub]"') from error
    folder = Path(folder)
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else None
    writes = card is None or _is_signed(card)
    if writes and license is None:
        license = ModelCard(card).data.get("license") if card else None
    if writes and license is None:
        raise ValueError("license: expected that of the model, such as mit, for its card; got none")
    if not writes and license is not None:
        raise ValueError(f"license: expected none beside {folder / CARD}, which is sent as it is; got {license}")
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if writes:
            with atomic_write(folder / CARD) as path:
                path.write_text(_sign(model_card(model, repository, str(license), _scores(folder))), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=FILES,
            delete_patterns=OPTIONAL,
            revision=branch,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    except HTTPError as error:
        raise ConnectionError(f"{repo_id}: not published: {error}") from error
    return str(commit.commit_url)


def model_card(model: "ImageFlow", repo_id: str, license: str, scores: str = "") -> str:
    """Return the card of a model, as Markdown with the metadata that the hub reads; ``scores`` is a part of it."""
    from huggingface_hub import ModelCardData

    kind, parameters = type(model).__name__, sum(parameter.numel() for parameter in model.parameters())
    tags = ["normalizing-flow", "image-generation", kind.lower()]
    pipeline = "unconditional-image-generation"
    data = ModelCardData(license=license, library_name="tarflow", pipeline_tag=pipeline, tags=tags)
    told = model.metadata
    lines = [f"A normalizing flow: {model.config.summary}, {parameters / 1e6:.1f}M parameters."]
    if trained := told.get("data"):
        lines.append(f"Trained on {trained['train']['source']}.")
    if sigma := told.get("sigma"):
        lines.append(f"Its density is of images with Gaussian noise of sigma {sigma:g}, which samples are rid of.")
    if names := told.get("class_names"):
        lines.append(f"Classes: {', '.join(names)}.")
    title, description = repo_id.rpartition("/")[2], "\n".join(lines)
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{description}\n\n{_usage(model, repo_id)}{scores}"


def _sign(card: str) -> str:
    """Add the line by which a card that nobody has changed is known."""
    return f"{card}{SIGNATURE}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def _is_signed(text: str) -> bool:
    card, signature, _ = text.rpartition(SIGNATURE)
    return bool(signature) and text == _sign(card)


def _usage(model: "ImageFlow", repo_id: str) -> str:
    """Commands and lines that draw samples, guided as ``config.json`` says."""
    kind, classes = type(model).__name__, model.config.num_classes
    guidance = Guidance(**told) if (told := model.metadata.get("guidance")) else None
    arguments, flags, imported = ["16"], "", kind
    if classes:
        arguments.append(f"labels=torch.arange(16) % {classes}")
    if guidance:
        others = [field.name for field in fields(guidance)[1:] if getattr(guidance, field.name) != field.default]
        options = ", ".join(f"{name}={getattr(guidance, name)!r}" for name in ["weight", *others])
        arguments.append(f"guidance=Guidance({options})")
        imported = f"Guidance, {kind}"
        flags = f" --guidance {guidance.weight:g}" if guidance == Guidance(guidance.weight) else ""
    return f"""## Use

```bash
pip install "tarflow[hub]"
tarflow sample {repo_id}{flags} --out samples.png
```

```python
import torch
from tarflow import {imported}

model = {kind}.from_pretrained("{repo_id}")
images = model.sample({", ".join(arguments)})  # {(16, *model.config.image_shape)}, in [-1, 1]
```
"""


def _scores(folder: Path) -> str:
    """The part of the card with the scores of ``tarflow evaluate``, if they are those of these weights."""
    path = folder / "evaluation.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not record or record.get("weights") != weights_digest(folder):
        return ""
    settings, samples = record["settings"], record.get("samples")
    protocol = f"up to {settings['num_images']:,} test images, seed {settings['seed']}: {record['data']}"
    scores = {name: f"{each['mean']:.4g} ± {each['standard_error']:.2g}" for name, each in record["scores"].items()}
    text = f"\n## Scores\n\n`tarflow evaluate`, {protocol}; mean ± standard error over images:\n\n{_table(scores)}"
    if samples:
        of_samples = {name: f"{score:.4g}" for name, score in samples["scores"].items()}
        text += f"\nOf samples:\n\n{_table(of_samples)}\nby this protocol:\n\n{_table(samples['protocol'])}"
    return text


def _table(rows: dict[str, Any]) -> str:
    return "".join(["| | |\n|---|---|\n", *(f"| {name} | {value} |\n" for name, value in rows.items())])
