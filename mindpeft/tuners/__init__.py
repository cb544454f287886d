"""The tuning methods: one file per method."""
