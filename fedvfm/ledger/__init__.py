"""The privacy ledger of a site: what was charged, receipts, reconciliation."""
