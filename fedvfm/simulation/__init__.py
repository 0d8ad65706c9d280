"""The simulation wing: virtual hospitals on one machine."""
