"""The same door as :mod:`fedvfm.server.proxy` as a configuration of nginx, for a coordinator who runs containers."""

from __future__ import annotations

from fedvfm import flower_runtime
from fedvfm.server import proxy

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
    large_client_header_buffers 4 8k;
    merge_slashes off;
    proxy_http_version 1.1;
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_max_temp_file_size 0;
    proxy_read_timeout {upstream}s;
    proxy_ssl_verify on;
    proxy_ssl_name {name};
    proxy_ssl_trusted_certificate {authority};

{locations}
    location ~ ^/(v1/)?({areas})(/|$|\\.) {{ return 403; }}
    location / {{ return 404; }}
}}
"""


def render(listen: str, certificate: str, key: str, upstream: str, authority: str) -> str:
    """A ``server`` block for nginx's ``conf.d``.

    Args:
        listen: ``port`` or ``address:port``.
        certificate: what it shows to sites.
        key: of its certificate.
        upstream: the SuperLink, ``host:port``.
        authority: whom the SuperLink's certificate must be from.
    """
    rows = [(route, "POST") for route in sorted(flower_runtime.FLEET_ROUTES)] + [("/health", "GET")]
    locations = "\n".join(
        f"    location = {route} {{\n"
        f"        if ($request_method != {method}) {{ return 405; }}\n"
        f'        if ($args != "") {{ return 404; }}\n'
        f"        proxy_pass https://{upstream};\n    }}"
        for route, method in rows
    )
    return _SERVER.format(
        listen=listen,
        certificate=certificate,
        key=key,
        authority=authority,
        name=upstream.rpartition(":")[0],
        body=proxy.MAX_BODY // (1024 * 1024),
        head=round(proxy.HEAD_S),
        piece=round(proxy.PIECE_S),
        upstream=round(proxy.UPSTREAM_S),
        locations=locations,
        areas="|".join(area.partition(".")[0] for area in proxy.AREAS),
    )
