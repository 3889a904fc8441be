"""What looks like a secret in the service's environment is not handed on, and nothing else is missing."""

from __future__ import annotations

import pytest

from shardyard_coordinator.launch.inherited import without_secrets

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA", "AWS_SESSION_TOKEN": "t", "HF_TOKEN": "hf_x", "GITHUB_TOKEN": "t",
    "wandb_api_key": "k",
    "OPENAI_API_KEY": "k", "CLIENT_SECRET": "s", "DJANGO_SECRET_KEY": "s", "PGPASSWORD": "p", "MYSQL_PWD": "p",
    "SMTP_PASS": "p", "GOOGLE_APPLICATION_CREDENTIALS": "/key.json", "DB_PASSWORD_FILE": "/p", "GITLAB_PAT": "p",
    "DATABASE_URL": "postgresql://me:word@db/x", "BROKER": "redis://:word@host:6379", "SSH_AUTH_SOCK": "/tmp/agent",
    "TOKEN": "t", "APIToken_KEY": "k", "CREDENTIALS": "c",
    "GPG_PASSPHRASE": "p", "REDISCLI_AUTH": "p", "CI_JOB_JWT": "j",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=k", "SENTRY_DSN": "https://k@host/1", "DOCKER_AUTH_CONFIG": "{}",
    "SSH_PRIVATE_KEY_BASE64": "LS0t", "SLACK_WEBHOOK_URL": "https://hooks/x", "npm_config__auth": "a",
    "GCP_SERVICE_ACCOUNT": '{"private_key": "-----BEGIN PRIVATE KEY-----"}',
}  # fmt: skip
OTHERS = {
    "PATH": "/usr/bin", "PWD": "/", "HOME": "/root", "NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5", "CUDA_HOME": "/cuda",
    "LD_LIBRARY_PATH": "/lib", "TOKENIZERS_PARALLELISM": "false", "SHARDYARD_TOKEN_CACHE_BYTES": "5", "KEYBOARD": "us",
    "http_proxy": "http://me:word@proxy:3128", "HF_ENDPOINT": "http://127.0.0.1:1", "MIRROR": "http://host:80/a@b",
    "RAY_AUTH_TOKEN": "ray", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "MONKEYS": "2", "PYTHONPATH": "/a:/b",
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_left_out(name: str) -> None:
    assert without_secrets({name: SECRETS[name]}) == {}


def test_everything_else_is_handed_on_as_it_is() -> None:
    assert without_secrets(OTHERS | SECRETS) == OTHERS
