"""nginx before the server's own door: what faces the network in containers, from Debian, without Python.

It ends the TLS of the sites, lets through POST of Flower's fleet routes and ``GET /health``, each under its exact name,
and speaks TLS to :mod:`fedvfm.server.network.proxy`, which looks at what nginx does not (whom a pushed message is from)
and holds questions for messages. So a fault of nginx opens the fleet routes and nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedvfm import errors
from fedvfm.flower import runtime
from fedvfm.server import state_folder
from fedvfm.server.network import proxy
from fedvfm.storage import storage
from fedvfm.trust import certificates

SEVERAL = 256
"""Connections of one address at a time; many sites may come through one."""

_WHOLE = """\
# Made by fedvfm. nginx -e stderr -c THIS_FILE -g 'daemon off;'   runs as any user; writes below {scratch} alone.
worker_processes 2;
pid {scratch}/nginx.pid;
events {{ worker_connections 2048; }}
http {{
    client_body_temp_path {scratch}/body;
    proxy_temp_path {scratch}/upstream;
    fastcgi_temp_path {scratch}/f;
    uwsgi_temp_path {scratch}/u;
    scgi_temp_path {scratch}/s;
    log_format refused '{{"time":"$time_iso8601","refused":$status,"client":"$remote_addr"}}';
    map $status $told {{ ~^[45] 1; default 0; }}
    access_log {log} refused if=$told;
    limit_conn_zone $binary_remote_addr zone=sites:1m;
    limit_conn sites {several};

{server}}}
"""

_SERVER = """\
# Made by fedvfm: of the SuperLink behind it nothing but what a SuperNode needs.
server {{
    listen {listen} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    server_tokens off;
    client_max_body_size {body}m;
    client_header_timeout {head}s;
    client_body_timeout {piece}s;
    send_timeout {piece}s;
    keepalive_timeout {idle}s;
    keepalive_requests 100000;
    reset_timedout_connection on;
    large_client_header_buffers 4 8k;
    merge_slashes off;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_max_temp_file_size 0;
    proxy_read_timeout {upstream_s}s;
    proxy_ssl_verify on;
    proxy_ssl_server_name on;
    proxy_ssl_name {name};
    proxy_ssl_trusted_certificate {authority};
{resolver}
{locations}
    location ~ ^/(v1/)?({areas})(/|$|\\.) {{ return 403; }}
    location / {{ return 404; }}
}}
"""

_LOCATION = """\
    location = {route} {{
        if ($request_method != {method}) {{ return 405; }}
        if ($request_uri != "{route}") {{ return 404; }}
        proxy_pass https://{upstream}{route};
    }}"""


def render(
    listen: str, certificate: str, key: str, upstream: str, authority: str, name: str = "localhost", resolver: str = ""
) -> str:
    """A ``server`` block for nginx's ``conf.d``, where an administrator has an nginx already.

    Args:
        listen: ``port`` or ``address:port``.
        certificate: what it shows to sites.
        key: of its certificate.
        upstream: ``host:port`` of the server's own door.
        authority: whom the certificate there must be from.
        name: what that certificate must be for; nginx knows no addresses in certificates.
        resolver: asked for the upstream's address again and again; empty for once, at the start.
    """
    # A variable in proxy_pass is what makes nginx ask again.
    again = f"    resolver {resolver} valid=10s;\n    set $behind {upstream};\n" if resolver else ""
    behind = "$behind" if resolver else upstream
    rows = [(route, "POST") for route in sorted(runtime.FLEET_ROUTES)] + [("/health", "GET")]
    return _SERVER.format(
        listen=listen,
        certificate=certificate,
        key=key,
        authority=authority,
        resolver=again,
        name=name,
        body=proxy.MAX_BODY // (1024 * 1024),
        head=round(proxy.HEAD_S),
        piece=round(proxy.PIECE_S),
        idle=proxy.IDLE_S,
        upstream_s=round(proxy.UPSTREAM_S),
        locations="\n".join(_LOCATION.format(route=route, method=method, upstream=behind) for route, method in rows),
        areas="|".join(area.partition(".")[0] for area in proxy.AREAS),
    )


@dataclass(frozen=True)
class Front:
    """An nginx of our own.

    Attributes:
        folder: configuration, certificate and key lie here, and nothing else of the server.
        listen: ``port`` or ``address:port``.
        upstream: ``host:port`` of the server's own door.
        resolver: of the names of containers, whose addresses change; empty for none.
        scratch: the one folder that nginx writes to.
        log: where refusals go.
    """

    folder: Path
    listen: str
    upstream: str
    resolver: str = ""
    scratch: str = "/tmp"  # noqa: S108 - a file system in memory of its own in a container
    log: str = "/dev/stdout"

    def write(self, where: state_folder.State) -> Path:
        """Write ``nginx.conf`` and what it needs, for their owner alone; the path of the configuration.

        The authority's key, the roster and the audit log stay where they are.

        Raises:
            ConfigError: if the server's certificate is good for no host name, or an address is none.
            StorageError: if the folder cannot be written.
        """
        certificates.split_address(self.upstream)
        name = self._verifiable(where)
        with storage.guard(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        paths = {name: self.folder.absolute() / name for name in ("server.pem", "server.key", "authority.pem")}
        for path, source in zip(paths.values(), (where.certificate, where.key, where.authority), strict=True):
            storage.write_bytes(path, source.read_bytes())
        certificate, key, authority = map(str, paths.values())
        made = self.folder / "nginx.conf"
        server = render(self.listen, certificate, key, self.upstream, authority, name, self.resolver)
        storage.write_text(made, _WHOLE.format(scratch=self.scratch, log=self.log, several=SEVERAL, server=server))
        return made

    def _verifiable(self, where: state_folder.State) -> str:
        """A host name of the server's certificate, that of the upstream where it is among them."""
        found = certificates.read_pem(where.certificate.read_text(), str(where.certificate))
        alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = alternatives.get_values_for_type(x509.DNSName)
        host = self.upstream.rpartition(":")[0]
        if not names:
            fault = "the server's certificate names addresses alone, which nginx cannot verify. Run: fedvfm server"
            raise errors.ConfigError("server nginx", [f"{fault} certify --san localhost"])
        return host if host in names else names[0]
