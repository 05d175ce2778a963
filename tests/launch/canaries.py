"""Secrets that nobody may find again, and the search for them."""

from pathlib import Path

ENVIRONMENT = {
    "HF_TOKEN": "canary-hf-2b7e151628aed2a6",
    "AWS_ACCESS_KEY_ID": "canary-aws-id-abf7158809cf4f3c",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-secret-762e7160f38b4da5",
    "AWS_SESSION_TOKEN": "canary-aws-session-6a784d9045190cfe",
    "WANDB_API_KEY": "canary-wandb-3243f6a8885a308d",
    "AZURE_STORAGE_ACCOUNT_KEY": "canary-azure-313198a2e0370734",
    "RAY_AUTH_TOKEN": "canary-ray-4a4093822299f31d",
    "COMET_API_KEY": "canary-comet-0082efa98ec4e6c8",
    "MY_DATABASE_PASSWORD": "canary-database-452821e638d01377",
    "GITHUB_TOKEN": "canary-github-be5466cf34e90c6c",
}


def hits(folder: Path) -> list[tuple[Path, str]]:
    """Return the files below a folder that hold a secret, with the variable whose value it is."""
    return [
        (path, name)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
        for name, secret in ENVIRONMENT.items()
        if secret.encode() in path.read_bytes()
    ]
