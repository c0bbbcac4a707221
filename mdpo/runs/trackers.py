"""Checks that the trackers of `report_to` can be written to, before anything is loaded, not when training begins."""

import threading

from mdpo.console import first_line
from mdpo.errors import UserError
from mdpo.ranks import agreed

ANSWER_S = 10.0  # for a server, a proxy and the names of both
OFFLINE = "Keep the run's log on disk with WANDB_MODE=offline (`wandb sync` sends it later), or set report_to: none"


def refuse_silent_trackers(args) -> None:
    """Raises UserError on all ranks where wandb would ask for a login, or fail, after everything else has been loaded.
    Rank 0 asks, for ANSWER_S at most. All ranks call it together."""
    if "wandb" in (args.report_to or []):
        agreed(_refuse_wandb)


def _refuse_wandb() -> None:
    import wandb
    from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth

    settings = wandb.setup().settings
    if settings.mode not in (None, "online", "run", "shared"):
        return
    key = settings.api_key or read_netrc_auth(host=settings.base_url)
    if not (key or settings.identity_token_file):
        raise UserError(
            f"report_to: wandb, but no login for {settings.base_url} is there. Type `wandb login`. {OFFLINE}."
        )
    if trouble := server_trouble(settings.base_url, key, settings.https_proxy or settings.http_proxy):
        raise UserError(f"report_to: wandb, but {settings.base_url} {trouble}. {OFFLINE}.")


def of_tracker(error: Exception) -> UserError | None:
    """What a user reads for an error of wandb's own, which comes when training begins; None for any other error."""
    if not type(error).__module__.startswith("wandb.") or isinstance(error, UserError):
        return None
    explained = UserError(f"report_to: wandb: {_cause(error)}. {OFFLINE}.")
    explained.__cause__ = error
    return explained


def server_trouble(url: str, key: str | None, proxy: str | None = None) -> str | None:
    """Why a wandb server cannot be used, in words that follow its name; None where it answers. Waits for ANSWER_S at
    most, whatever hangs."""
    answers: list[str | None] = []
    # A thread: looking up a name, or a server that sends a byte now and then, has no limit of its own.
    thread = threading.Thread(target=lambda: answers.append(_asked(url, key, proxy)), daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return answers[0] if answers else f"gives no answer within {ANSWER_S:.0f} s"


def _asked(url: str, key: str | None, proxy: str | None) -> str | None:
    import requests

    options = {"json": {"query": "query { viewer { id } }"}, "auth": ("api", key) if key else None}
    options |= {"timeout": ANSWER_S, "proxies": {"http": proxy, "https": proxy} if proxy else None}
    try:
        with requests.post(f"{url.rstrip('/')}/graphql", stream=True, **options) as answer:
            status = answer.status_code
    except requests.exceptions.SSLError:
        return None  # it is there; wandb trusts other certificates than `requests` does
    except requests.Timeout:
        return f"gives no answer within {ANSWER_S:.0f} s"
    except requests.RequestException as error:
        proxied = "through the proxy that is set (HTTPS_PROXY, HTTP_PROXY) " if "roxy" in str(error) else ""
        return f"cannot be reached {proxied}({_cause(error)})"
    if key and status in (401, 403):
        return f"does not take the login (HTTP {status}: `wandb login --relogin`)"
    return f"answers HTTP {status}" if status >= 500 or status == 407 else None


def _cause(error: Exception) -> str:
    """The innermost reason in a few words: Connection refused."""
    inner = error
    while (cause := getattr(inner, "reason", None) or inner.__cause__ or inner.__context__) is not None:
        if not isinstance(cause, Exception):
            break
        inner = cause
    return (getattr(inner, "strerror", None) or first_line(inner))[:160]
