"""HTTP entrances: health, readiness, metrics for operators; the node API for gateway machines."""
