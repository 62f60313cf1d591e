"""The notifier's composition: settings in, a ``Notifier`` that can send webhooks and follow-up tasks out."""

from __future__ import annotations

from celery import Celery

from agentq.errors import ConfigError
from agentq.notify.address import Guard, parse_networks
from agentq.notify.notifier import Notifier
from agentq.notify.signature import Secrets, parse_secrets
from agentq.notify.webhook import WebhookSender
from agentq.store.mongo import MongoStore
from config.settings import Settings
from workers.failpoints import crash_point
from workers.follow_up import FollowUpSender


def make_notifier(settings: Settings, app: Celery, store: MongoStore) -> Notifier:
    """Call it on the loop that the notifier will run on. Raises ``ConfigError``."""
    webhook = WebhookSender(_secrets(settings), Guard(parse_networks(settings.webhook_networks)))
    return Notifier(
        store.deliveries, {"webhook": webhook, "follow_up": FollowUpSender(app)}, crash=crash_point(settings.failpoint)
    )


def _secrets(settings: Settings) -> Secrets:
    if settings.webhook_secrets is not None:
        return parse_secrets(settings.webhook_secrets.get_secret_value())
    if settings.webhook_secrets_file is not None:
        try:
            return parse_secrets(settings.webhook_secrets_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{settings.webhook_secrets_file} cannot be read: {type(error).__name__}.",
                code="bad_webhook_secrets",
                hint="Correct AGENTQ_WEBHOOK_SECRETS_FILE.",
            ) from None
    return Secrets({})
