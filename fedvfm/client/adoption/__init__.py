"""The final adapter at a site: judged, then adopted or not."""
