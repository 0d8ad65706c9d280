"""The processes of a site: executor, SuperNode, supervisor."""
