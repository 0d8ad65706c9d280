"""What stands between a message and the site's data: approval, policy, ledger, reply cache."""
