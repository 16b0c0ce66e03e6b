"""The tests' PostgreSQL server: it takes tables, and Optuna's studies."""

import optuna
import sqlalchemy


def test_takes_a_table(postgres):
    engine = sqlalchemy.create_engine(postgres.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE seen (number INTEGER PRIMARY KEY)"))
        connection.execute(sqlalchemy.text("INSERT INTO seen VALUES (1), (2)"))
    with engine.begin() as connection:
        assert connection.execute(sqlalchemy.text("SELECT count(*) FROM seen")).scalar() == 2
        assert connection.execute(sqlalchemy.text("SHOW server_version")).scalar().startswith("16.")
        connection.execute(sqlalchemy.text("DROP TABLE seen"))
    engine.dispose()


def test_takes_a_study(postgres):
    storage = optuna.storages.RDBStorage(postgres.replace("postgresql://", "postgresql+psycopg://"))
    study = optuna.create_study(study_name="ten", storage=storage)
    for _ in range(10):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", -1, 1) ** 2)
    again = optuna.load_study(study_name="ten", storage=storage)
    assert [t.state for t in again.trials] == [optuna.trial.TrialState.COMPLETE] * 10
    assert again.best_value == min(t.value for t in again.trials)
    optuna.delete_study(study_name="ten", storage=storage)
    storage.engine.dispose()
