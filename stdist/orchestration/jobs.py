"""``stdist train`` or ``stdist forecast`` as a job on a Ray cluster.

The job runs in a copy of the working directory, which Ray uploads and later throws away. So what a run reads and writes
beside its configuration is named to it by the absolute path it has on the submitting machine: the store, the output
folder and a folder that holds the base model lie on a file system that this machine and the cluster share.
"""

import asyncio
import json
import logging
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from stdist.config import LearnersConfig, RunConfig
from stdist.errors import InputError, Interrupted, ResourceError
from stdist.files import require_outside
from stdist.orchestration.cluster import require_workers
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.recipes import load_config, read_run_config, recipe_of

try:
    from aiohttp import ClientError
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as UPLOAD_LIMIT
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
    from ray.job_submission import JobStatus, JobSubmissionClient
except ModuleNotFoundError as error:
    raise InputError("Ray is not installed; pip install 'stdist[cluster]'") from error

ANSWER_TIMEOUT = 10.0
"""Seconds in which the dashboard has to answer."""
POLL = 0.5
"""Seconds between two looks at a job."""
STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "600"}
"""A stopped job gets Ctrl-C and ten minutes to finish and save its step; Ray's own is SIGTERM and three seconds."""
DATA = ("*.zarr", "*.zarr.partial")
"""Never uploaded, like the run's own store and output folder, what Ray leaves out by itself (.git, .venv, venv,
__pycache__) and what .gitignore and .rayignore name."""

for _name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class JobEnd:
    """``status``: SUCCEEDED, FAILED or STOPPED. ``error``: the last error line of a job that failed."""

    submission_id: str
    status: str
    exit_code: int
    error: str | None = None


class Job:
    """A job on the cluster whose dashboard is at ``address``."""

    def __init__(self, client: JobSubmissionClient, address: str, submission_id: str) -> None:
        self.client, self.address, self.submission_id = client, address, submission_id
        self._shown = 0

    @property
    def how_to_go_on(self) -> str:
        where = f"{self.submission_id} --address {self.address}"
        return f"follow it with `ray job logs --follow {where}`, stop it with `stdist submit --stop {where}`"

    def follow(self, show: Callable[[str], None]) -> JobEnd:
        """Gives ``show`` the job's log, piece by piece, until the job has ended.

        Raises Interrupted on Ctrl-C and ResourceError where the cluster is lost; neither ends the job.
        """
        try:
            while True:
                # A connection may break where a job is silent for long.
                with suppress(RuntimeError, ClientError, OSError):
                    asyncio.run(self._show_rest(show))
                if (end := self._end()) is not None:
                    return end
                time.sleep(POLL)
        except KeyboardInterrupt:
            raise Interrupted(f"job {self.submission_id} goes on; {self.how_to_go_on}") from None
        except (RuntimeError, OSError) as error:
            raise ResourceError(
                f"{self.address} answers no more; as long as the cluster lives job {self.submission_id} goes on: "
                f"{self.how_to_go_on}"
            ) from error

    async def _show_rest(self, show: Callable[[str], None]) -> None:
        """The log from its first character; what was shown before is skipped."""
        read = 0
        async for text in self.client.tail_job_logs(self.submission_id):
            show(text[max(0, self._shown - read) :])
            read += len(text)
            self._shown = max(self._shown, read)

    def stop(self) -> JobEnd:
        """Stops the job and waits for its end, if it has not ended before. Raises InputError: no such job."""
        try:
            self.client.stop_job(self.submission_id)
            while (end := self._end()) is None:
                time.sleep(POLL)
        except (RuntimeError, OSError) as error:
            raise _refusal(error, self.address, self.submission_id) from error
        return end

    def _end(self) -> JobEnd | None:
        details = self.client.get_job_info(self.submission_id)
        status = details.status
        if not status.is_terminal():
            return None
        if status != JobStatus.FAILED:
            return JobEnd(self.submission_id, status.value, 0 if status == JobStatus.SUCCEEDED else 130)
        code = details.driver_exit_code or 1
        return JobEnd(self.submission_id, status.value, code if code > 0 else 128 - code, _last_error(details.message))


def submit(
    config: Path, overrides: list[str], address: str, working_dir: Path, submission_id: str | None = None
) -> tuple[Job, RunConfig]:
    """Submits ``stdist train CONFIG key=value …`` to the cluster whose dashboard is at ``address``, http://HOST:8265.

    ``config`` and the relative paths in it are relative to ``working_dir``. A run of one learner claims
    ``learners.resources_per_worker`` of one node and runs there; others start on the head.
    Raises InputError before anything is sent: the configuration is not valid or not in the working directory, the
    directory is larger than Ray takes, nobody answers at the address, the token is refused; and where the
    submission id is taken.
    """
    root = _root(working_dir)
    path = Path(os.path.abspath(root / config))
    if not path.is_relative_to(root):
        raise InputError(f"config {path} lies outside the working directory {root}, all that the job sees; move it")
    with chdir(root):
        parsed = load_config(path, overrides)
    shared = parsed.shared_paths(root)
    excludes = [*DATA, *(f"/{folder.relative_to(root)}" for folder in shared.values() if root in folder.parents)]
    _require_small(root, excludes, path)
    kept = [override for override in overrides if override.partition("=")[0] not in shared]
    command = ["stdist", "train", str(path.relative_to(root)), *kept]
    # A JSON string is a YAML value, whatever characters a path has.
    command += [f"{key}={json.dumps(str(value), ensure_ascii=False)}" for key, value in shared.items()]
    claims = {} if recipe_of(parsed).workers(parsed) else _claims(parsed.learners)
    return _send(command, root, excludes, address, submission_id, claims), parsed


def submit_forecast(
    request: ForecastRequest, workers: int | None, address: str, working_dir: Path, submission_id: str | None = None
) -> Job:
    """Submits the ``stdist forecast`` of ``request`` by ``workers`` of the cluster, as many as it has room for if None.

    Run, store and output are named by the absolute paths that they have on this machine. Raises InputError as
    ``submit`` does, and where there is no such run here.
    """
    require_workers(workers)
    root = _root(working_dir)
    require_outside(request.out)
    read_run_config(request.run_dir)
    run, store, out = (Path(os.path.abspath(path)) for path in (request.run_dir, request.store, request.out))
    # Beside a run lie others: what is uploaded is code.
    excludes = [*DATA, *(f"/{p.relative_to(root)}" for p in (run.parent, run, store, out) if root in p.parents)]
    _require_small(root, excludes)
    command = ["stdist", *replace(request, run_dir=run, store=store, out=out).as_arguments(), "--ray", "auto"]
    command += ["--workers", str(workers)] if workers else []
    return _send(command, root, excludes, address, submission_id, claims={})


def _root(working_dir: Path) -> Path:
    root = Path(os.path.abspath(working_dir))
    if not root.is_dir():
        raise InputError(f"working directory {root} does not exist; correct --working-dir")
    return root


def _send(
    command: list[str],
    root: Path,
    excludes: list[str],
    address: str,
    submission_id: str | None,
    claims: dict[str, Any],
) -> Job:
    client = _connect(address)
    try:
        submission_id = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"working_dir": str(root), "excludes": excludes, "env_vars": STOP},
            submission_id=submission_id,
            **claims,
        )
    except (RuntimeError, OSError) as error:
        raise _refusal(error, address, submission_id) from error
    return Job(client, address, submission_id)


def find(address: str, submission_id: str) -> Job:
    """A job that was submitted before. Raises InputError: nobody answers at the address, the token is refused."""
    return Job(_connect(address), address, submission_id)


def _claims(learners: LearnersConfig) -> dict[str, Any]:
    if learners.num_workers > 1:
        return {}  # the learners claim them
    resources = dict(learners.resources_per_worker or {})
    names = {"CPU": "entrypoint_num_cpus", "GPU": "entrypoint_num_gpus", "memory": "entrypoint_memory"}
    return {names[key]: resources.pop(key) for key in names if key in resources} | {"entrypoint_resources": resources}


def _require_small(root: Path, excludes: list[str], config: Path | None = None) -> None:
    """Walks as Ray will when it packs the directory. The dashboard takes less than Ray's own packages may have."""
    sizes: Counter[str] = Counter()
    uploaded: set[Path] = set()

    def add(file: Path) -> None:
        if file.is_file():
            sizes[file.relative_to(root).parts[0]] += file.stat().st_size
            uploaded.add(file)

    respect_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    _dir_travel(root, [_get_excludes(root, get_runtime_env_default_excludes() + excludes)], add, respect_gitignore)
    if sizes.total() > UPLOAD_LIMIT:
        largest = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.most_common(3))
        raise InputError(
            f"working directory {root} has {sizes.total() / 2**20:.0f} MiB to upload and Ray takes "
            f"{UPLOAD_LIMIT // 2**20} MiB; largest: {largest}; name what the job does not need in .rayignore or "
            ".gitignore, or give a smaller --working-dir"
        )
    if config is not None and config not in uploaded:
        raise InputError(
            f"config {config} is kept from the job by .gitignore, .rayignore or the names of data; move it"
        )


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is an error: urllib would send the token along, whatever the host."""

    def redirect_request(self, *_arguments: Any) -> None:
        return None


_REDIRECTS = (301, 302, 303, 307, 308)


def _connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise InputError(f"{address} is no address of a Ray dashboard; write http://HOST:8265")
    token, source = _token()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(
            f"the token of {source} has a line break or another character that no token has; take the head's "
            "(`ray get-auth-token` there)"
        )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # Ray's own client would wait for an answer for ever.
        request = Request(f"{address.rstrip('/')}/api/version", headers=headers)
        with build_opener(_NoRedirect).open(request, timeout=ANSWER_TIMEOUT) as answer:
            is_dashboard = b"ray_version" in answer.read()
    except HTTPError as error:
        if error.code == 401:
            raise InputError(
                f"{address} asks for a token and there is none; put the head's (`ray get-auth-token` there) into "
                "RAY_AUTH_TOKEN or the file ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
            ) from error
        if error.code == 403:
            raise InputError(
                f"{address} refuses the token of {source}; take the head's (`ray get-auth-token` there)"
            ) from error
        if error.code in _REDIRECTS:
            raise InputError(
                f"{address} sends on to {error.headers.get('Location')}, and the token goes nowhere else; "
                "give that address if it is the dashboard's"
            ) from error
        is_dashboard = False
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"nothing answers at {address} ({getattr(reason, 'strerror', None) or reason}); give the dashboard's "
            "address, which `ray start --head` prints"
        ) from error
    except (HTTPException, ValueError):
        is_dashboard = False
    if not is_dashboard:
        raise InputError(f"what answers at {address} is no Ray dashboard; give the one `ray start --head` prints")
    # Ray lets these overrule its own argument.
    overruling = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        return JobSubmissionClient(address, headers=headers)
    finally:
        os.environ.update({name: value for name, value in overruling.items() if value is not None})


def _token() -> tuple[str, str]:
    """Returns the token and its source, in Ray's order; sent whether or not RAY_AUTH_MODE is set on this machine."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip(), str(path)
    except (OSError, ValueError) as error:
        if named:
            raise InputError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read; name the file of the token") from error
        return "", ""


def _refusal(error: Exception, address: str, submission_id: str | None) -> InputError | ResourceError:
    """Ray's refusal as one line; it comes with a status code, a traceback of the server's or both."""
    text = str(error).strip()
    if isinstance(error, OSError):
        job = f"; `ray job list --address {address}` says what became of {submission_id or 'the job'}"
        return ResourceError(f"{address} answers no more ({text.splitlines()[0] if text else 'no reason given'}){job}")
    if f"{submission_id} already exists" in text:
        return InputError(f"there is a job {submission_id} at {address}; choose another --submission-id")
    if f"Job {submission_id} does not exist" in text:
        return InputError(f"no job {submission_id} at {address}; `ray job list --address {address}` names them")
    return InputError(f"{address}: {text.splitlines()[-1] if text else type(error).__name__}")


def _last_error(message: str | None) -> str:
    """stdist's own error line among the last lines of a job's log, else the last of them."""
    lines = [line.strip() for line in (message or "no message").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1]
