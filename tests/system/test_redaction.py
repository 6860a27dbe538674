"""Secrets reach no file: whatever names them, in whatever form they come."""

import pytest

from litdiffusion.system.redaction import (
    SECRET_KEY,
    redacted,
    redacted_code,
    redacted_override,
    without_secrets,
)


def test_what_lies_under_a_secret_key_is_masked_at_any_depth() -> None:
    shown = without_secrets(
        {
            "api_key": "abc",
            "hub": {"token": ["one", {"deep": "two"}]},
            "password": 1234567890123,
            "seed": 1234567890123,
        }
    )
    assert "abc" not in str(shown)
    assert "one" not in str(shown)
    assert "two" not in str(shown)
    assert str(shown).count("1234567890123") == 1
    assert shown["seed"] == 1234567890123


@pytest.mark.parametrize(
    "name", ["DB_PASS", "SSH_PASSPHRASE", "BASIC_AUTH", "SENTRY_DSN", "MYSQL_PWD", "PGPASSWORD", "pass"]
)
def test_names_of_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cr3t-value")
    assert redacted("it is s3cr3t-value") == "it is ***"


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "AUTHOR", "bypass", "num_passes"])
def test_names_of_no_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/home/somebody")
    assert redacted("in /home/somebody") == "in /home/somebody"


def test_short_numbers_and_switches_are_settings() -> None:
    assert without_secrets({"token": 3, "secret": True}) == {"token": 3, "secret": True}


def test_the_environments_secrets_are_found_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-of-this-machine")
    for hide in (redacted, redacted_code, redacted_override):
        assert "s3cr3t-of-this-machine" not in hide("name=before s3cr3t-of-this-machine after")
    assert "s3cr3t-of-this-machine" not in str(
        without_secrets({"note": ["s3cr3t-of-this-machine"]}, SECRET_KEY)
    )


def test_code_that_assigns_a_secret_is_masked() -> None:
    diff = '+api_key = "0123456789abcdef"\n+count = 3\n'
    assert "0123456789abcdef" not in redacted_code(diff)
    assert "+count = 3" in redacted_code(diff)


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "+db.pass",
        "++extra.auth",
        "a.cookie",
        "db.pwd",
        "x.dsn.y",
        "+a@extra.bearer",
        "list.0.pwd",
        "a.authorization",
    ],
)
def test_an_override_is_masked_whatever_part_of_its_key_names_a_secret(key: str) -> None:
    assert redacted_override(f"{key}=hunter2hunter2") == f"{key}=***"


def test_an_override_is_masked_inside_a_dictionary() -> None:
    for secret in ("pass: hunter2", "'api_key': hunter2", "deep: {auth: [hunter2, 1]}"):
        assert redacted_override(f"+db={{user: me, {secret}}}") == "+db=***"
    for harmless in (
        "net.dim_mults=[1,2,4]",
        "+a={b: 1, c: [2, 3]}",
        "data.path=/home/me/passes",
        "+a.author=me",
    ):
        assert redacted_override(harmless) == harmless


def test_a_bearers_token_is_known_by_its_form() -> None:
    assert redacted("Authorization: Bearer abcdef0123456789") == "Authorization: Bearer ***"
    assert redacted("the bearer presented-to-everybody") == "the bearer presented-to-everybody"
