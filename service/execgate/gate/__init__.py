"""Who may do what to which container: identity, policy, audit, recording."""
