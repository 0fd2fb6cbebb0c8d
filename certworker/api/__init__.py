"""HTTP entrance for operators: health, readiness, metrics."""
