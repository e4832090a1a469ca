"""What the machine and the installation give: files written whole, locks, processes, versions, optional extras."""
