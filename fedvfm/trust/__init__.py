"""Who may take part: keys, certificates, invites, requests, the roster and approvals. Used by both ends."""
