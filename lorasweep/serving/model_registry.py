"""The winner in MLflow: logged as a model, and its place in the model registry (serving/champion.py)."""

import json
import tempfile
from pathlib import Path
from typing import Any

from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import redact
from lorasweep.errors import ConfigError, MlflowDown, MlflowRefused
from lorasweep.files import read_json, replace_file
from lorasweep.serving import champion, mlflow_model, winner
from lorasweep.serving.champion import Score
from lorasweep.study import example_scores
from lorasweep.study.study import Study
from lorasweep.tasks.metric import Parts
from lorasweep.tracking import outbox, runs
from lorasweep.tracking.mlflow_store import Mirror

CHAMPION, CHALLENGER = "champion", "challenger"
NOT_LOGGED = "the model was not logged"
"""How the answer of `log_winner` begins where MLflow does not have the model."""


def log_winner(study: Study, spec: TrialSpec) -> str:
    """Log the winner as an MLflow model, register it where `tracking.register` asks for that; return what was done.

    "" where nothing was asked for, or it was done before. A study does not fail by MLflow: what went wrong is told.
    """
    track = spec.tracking
    best = study.best()
    if not track.enabled or best is None or not (track.log_model or track.register):
        return ""
    try:
        number = winner.pick(study, best.number)
        return Registry(runs.store_uri(spec)).put(study, number, track.experiment, track.register)
    except (MlflowDown, MlflowRefused, ConfigError, OSError) as error:
        return f"{NOT_LOGGED}: {redact(str(error))}"


class Registry(Mirror):
    """The models of a store."""

    def put(self, study: Study, number: int, experiment: str, name: str | None) -> str:
        """Log a trial as a model, and register it under `name`, each once; return what was done, "" for nothing."""
        folder = study.trial_folder(number)
        path = study.folder / "model.json"
        note = read_json(path) or {}
        if (note.get("uri"), note.get("trial")) != (self._here, number):
            note = {
                "uri": self._here,
                "trial": number,
                "model_id": self._model(folder, experiment, study.trusted),
                "registered": "",
            }
            replace_file(path, json.dumps(note, indent=1))
        elif note["registered"] == (name or note["registered"]):
            return ""
        told = f"model in MLflow: models:/{note['model_id']}"
        if name:
            told += f"\n{self._register(name, note['model_id'], study, number)}"
            replace_file(path, json.dumps(note | {"registered": name}, indent=1))
        return told

    def _model(self, folder: Path, experiment: str, trusted: bool) -> str:
        """Return the id of a new model: adapter, settings, and what the test examples add to the metric."""
        from mlflow.entities import LoggedModelOutput

        run = outbox.load(folder)
        run_id = run.run_id if run and run.uri == self._here else None
        with tempfile.TemporaryDirectory() as place:
            saved = Path(place) / "model"
            mlflow_model.save(folder, saved, folder.parent.parent / mlflow_model.BASES, trusted=trusted)
            example_scores.copy_test_scores(folder, saved)
            model = self._ask("create_logged_model", self._experiment(experiment), "model", run_id)
            self._ask("log_model_artifacts", model.model_id, str(saved))
        self._ask("finalize_logged_model", model.model_id, "READY")
        if run_id:
            self._ask("log_outputs", run_id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_id)

    def _register(self, name: str, model_id: str, study: Study, number: int) -> str:
        """Make a version of a registered model, and give it an alias; return what was done, and why."""
        try:
            self._ask("get_registered_model", name)
        except MlflowRefused:
            self._ask("create_registered_model", name)
        score = Score.of(study, number)
        model = self._ask("get_logged_model", model_id)
        version = self._ask(
            "create_model_version",
            name,
            model.artifact_location,
            model.source_run_id,
            score.tags(),
            await_creation_for=0,
            model_id=model_id,
        ).version
        alias, why = CHAMPION, "the first"
        try:
            holder = self._ask("get_model_version_by_alias", name, CHAMPION)
        except MlflowRefused:
            holder = None
        if holder is not None:
            theirs = Score.from_tags(holder.tags)
            better, why = champion.beats(score, score.parts(), theirs, self._test_scores(holder, theirs))
            alias = CHAMPION if better else CHALLENGER
        self._ask("set_registered_model_alias", name, alias, version)
        return f"registered as {name} version {version}, {alias}: {why}"

    def _test_scores(self, version: Any, score: Score | None) -> Parts | None:
        """Return what each test example adds to a version's metric: of its trial's folder, else of what MLflow keeps
        with the model; None where neither has it.
        """
        there = score.parts() if score is not None else None
        if there is not None or score is None:
            return there
        import mlflow
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as place:
            try:
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{version.source}/{example_scores.TEST_NAME}",
                    dst_path=place,
                    tracking_uri=self._client.tracking_uri,
                )
            except (MlflowException, OSError):
                return None
            found = example_scores.read(Path(place), example_scores.TEST_NAME)
            return found if found is not None and score.is_of(found) else None
