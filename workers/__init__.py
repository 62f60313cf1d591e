"""The Celery application: ``workers.app`` is the composition root, one module a pool holds what that role does."""
