"""Hypothesis profiles: `HYPOTHESIS_PROFILE=nightly` tries ten times as many runs, new ones each time."""

import os

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the third-party job installs pytest and torch only
    pass
else:
    slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile(
        "default",
        max_examples=50,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=slow_is_fine,
    )
    settings.register_profile(
        "nightly",
        max_examples=500,
        deadline=None,
        print_blob=True,
        suppress_health_check=slow_is_fine,
    )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
