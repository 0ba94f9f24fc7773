"""Which layouts fit, and what each would take: arithmetic on config.json."""
