//! The WireGuard cross-platform userspace API: parse, apply and report configuration.
//!
//! A `set` is parsed and checked whole, then applied with one swap of the route snapshot: an
//! invalid line changes nothing, and an allowed-ip moves between peers with no moment in between.
//! One key of our own: `retinue_cipher` (chacha20poly1305 or aes-256-gcm) per peer.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use zeroize::{Zeroize, Zeroizing};

use crate::crypto::{blank_secret, Cipher, Key, Secret, SecretKey};
use crate::device::{Control, Core, Identity};
use crate::engine::Engine;
use crate::events::Event;
use crate::peer::{lock, Endpoint, Peer};
use crate::router::{Prefix, Table};
use crate::timers::UNSET;

/// errno of a failed operation, as the API reports it (negative).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

const EINVAL: Errno = Errno(libc::EINVAL);
/// Most peers one device may have, as wireguard-go.
const MAX_PEERS: usize = 1 << 16;

/// One peer section of a `set`.
#[derive(Default)]
pub struct PeerChange {
    pub public: Key,
    pub remove: bool,
    pub update_only: bool,
    pub psk: Option<Secret>,
    pub endpoint: Option<SocketAddr>,
    pub keepalive: Option<u16>,
    pub cipher: Option<Cipher>,
    pub replace_allowed: bool,
    /// Prefixes in order; false = remove.
    pub allowed: Vec<(Prefix, bool)>,
}

/// A whole `set`, checked.
#[derive(Default)]
pub struct Change {
    pub private: Option<Secret>,
    pub port: Option<u16>,
    pub mark: Option<u32>,
    pub replace_peers: bool,
    pub peers: Vec<PeerChange>,
}

fn hex_key(s: &str) -> Result<Secret, Errno> {
    let mut out = blank_secret();
    if s.len() != 64 {
        return Err(EINVAL);
    }
    let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8).ok_or(EINVAL);
    for (o, pair) in out.iter_mut().zip(s.as_bytes().chunks_exact(2)) {
        *o = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(out)
}

fn number<T: std::str::FromStr>(s: &str) -> Result<T, Errno> {
    // `parse` would take a leading plus sign.
    if s.is_empty() || !s.bytes().all(|b| b.is_ascii_digit()) {
        return Err(EINVAL);
    }
    s.parse().map_err(|_| EINVAL)
}

fn flag(s: &str) -> Result<(), Errno> {
    if s == "true" {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

fn prefix(s: &str) -> Result<(Prefix, bool), Errno> {
    let (s, add) = match s.strip_prefix('-') {
        Some(rest) => (rest, false),
        None => (s, true),
    };
    let (ip, len) = s.split_once('/').ok_or(EINVAL)?;
    let p = Prefix::new(ip.parse().map_err(|_| EINVAL)?, number(len)?).ok_or(EINVAL)?;
    Ok((p, add))
}

fn endpoint(s: &str) -> Result<SocketAddr, Errno> {
    if let Ok(a) = s.parse::<SocketAddr>() {
        return Ok(a);
    }
    // [fe80::1%eth0]:port, with a name for the zone.
    let (host, port) = s.strip_prefix('[').and_then(|r| r.split_once("]:")).ok_or(EINVAL)?;
    let (ip, zone) = host.split_once('%').ok_or(EINVAL)?;
    let scope = crate::netlink::index_of(zone).map_err(|_| EINVAL)?;
    let ip = ip.parse().map_err(|_| EINVAL)?;
    Ok(std::net::SocketAddrV6::new(ip, number(port)?, 0, scope).into())
}

/// Parses the lines of a `set` (without the `set=1` line); any fault refuses all of it.
pub fn parse_set<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Change, Errno> {
    let mut c = Change::default();
    for line in lines {
        let (key, value) = line.split_once('=').ok_or(EINVAL)?;
        if key == "public_key" {
            c.peers.push(PeerChange { public: **hex_key(value)?, ..PeerChange::default() });
            continue;
        }
        let Some(p) = c.peers.last_mut() else {
            match key {
                "private_key" => c.private = Some(hex_key(value)?),
                "listen_port" => c.port = Some(number(value)?),
                "fwmark" => c.mark = Some(mark(value)?),
                "replace_peers" => {
                    flag(value)?;
                    c.replace_peers = true;
                }
                _ => return Err(EINVAL),
            }
            continue;
        };
        match key {
            "remove" => {
                flag(value)?;
                p.remove = true;
            }
            "update_only" => {
                flag(value)?;
                p.update_only = true;
            }
            "preshared_key" => p.psk = Some(hex_key(value)?),
            "endpoint" => p.endpoint = Some(endpoint(value)?),
            "persistent_keepalive_interval" => p.keepalive = Some(number(value)?),
            "replace_allowed_ips" => {
                flag(value)?;
                p.replace_allowed = true;
            }
            "allowed_ip" => p.allowed.push(prefix(value)?),
            "protocol_version" if value == "1" => {}
            "retinue_cipher" => p.cipher = Some(Cipher::parse(value).ok_or(EINVAL)?),
            _ => return Err(EINVAL),
        }
    }
    Ok(c)
}

fn mark(s: &str) -> Result<u32, Errno> {
    match s.strip_prefix("0x") {
        Some(h) if !h.is_empty() && h.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u32::from_str_radix(h, 16).map_err(|_| EINVAL)
        }
        _ => number(s),
    }
}

/// Applies a checked change: what can fail (limits, sockets) first, the rest cannot.
pub fn apply(engine: &Engine, change: Change, now: u64) -> Result<(), Errno> {
    let errno = |e: io::Error| Errno(e.raw_os_error().unwrap_or(libc::EIO));
    let _one = lock(&engine.configuring);
    admissible(&engine.core, &change)?;
    let old_mark = engine.mark.load(Relaxed);
    if let Some(m) = change.mark {
        engine.set_mark(m).map_err(errno)?;
    }
    if let Err(e) = engine.rebind(change.port) {
        // Nothing is changed by a failed set, the mark neither.
        let _ = engine.set_mark(old_mark);
        return Err(errno(e));
    }
    configure(&engine.core, change, now);
    Ok(())
}

/// Refuses a change that would exceed the limits.
pub fn admissible(core: &Core, change: &Change) -> Result<(), Errno> {
    let c = lock(&core.control);
    let kept = if change.replace_peers { 0 } else { c.peers.len() };
    let fresh = |p: &&PeerChange| !p.remove && (change.replace_peers || !c.peers.contains_key(&p.public));
    if kept + change.peers.iter().filter(fresh).count() > MAX_PEERS {
        return Err(Errno(libc::ENOSPC));
    }
    Ok(())
}

/// Changes keys, peers and routes: all packets see either the old or the new configuration.
pub fn configure(core: &Core, change: Change, now: u64) {
    let mut c = lock(&core.control);
    let mut routes = Table::clone(&core.routes.load());
    let mut gone: Vec<Arc<Peer>> = Vec::new();
    let mut reset: Vec<Arc<Peer>> = Vec::new();
    if let Some(private) = change.private {
        set_private(&mut c, &private, &mut routes, &mut gone, &mut reset);
        let key = c.identity.as_ref().map(|i| Arc::new(crate::cookie::mac1_key(&i.public)));
        core.mac1_key.store(key);
    }
    if change.replace_peers {
        routes = Table::default();
        gone.extend(c.peers.drain().map(|(_, p)| p));
    }
    let mut started = Vec::new();
    let mut touched = Vec::new();
    for p in change.peers {
        touched.extend(apply_peer(&mut c, p, &mut routes, &mut gone, &mut reset, &mut started));
    }
    // From here on every packet is judged by the new configuration.
    core.routes.store(Arc::new(routes));
    for p in &gone {
        core.retire(p);
    }
    for p in &reset {
        // Whoever changes last speaks first: a tunnel in use is back at once, not at the next retry.
        let used = p.current.load().is_some();
        core.forget_sessions(p);
        if used {
            core.want_handshake(p, now);
        }
    }
    drop(c);
    for p in touched {
        // What waited for an endpoint or a key may have one now.
        if !lock(&p.staged).is_empty() {
            core.queue.push(Event::Flush(p));
        }
    }
    for p in started {
        if let Some(at) = p.timers.traversal(now) {
            // Due at once: the first keepalive brings the tunnel up.
            p.timers.persistent_at.store(now, Relaxed);
            core.arm_timer(&p, at.min(now));
        }
    }
}

fn set_private(
    c: &mut Control,
    private: &Key,
    routes: &mut Table<Arc<Peer>>,
    gone: &mut Vec<Arc<Peer>>,
    reset: &mut Vec<Arc<Peer>>,
) {
    let identity = (*private != [0; 32]).then(|| Identity::new(SecretKey::from_bytes(*private)));
    let same = match (&c.identity, &identity) {
        (Some(a), Some(b)) => crate::crypto::same_key(a.secret.expose(), b.secret.expose()),
        (None, None) => true,
        _ => false,
    };
    if same {
        return;
    }
    if let Some(me) = identity.as_ref().and_then(|i| c.peers.remove(&i.public)) {
        drop_routes(&me, routes);
        gone.push(me);
    }
    for p in c.peers.values() {
        lock(&p.handshake).static_static = None;
        reset.push(p.clone());
    }
    c.identity = identity;
}

fn drop_routes(peer: &Arc<Peer>, routes: &mut Table<Arc<Peer>>) {
    for p in std::mem::take(&mut *lock(&peer.allowed)) {
        routes.remove(p);
    }
}

fn apply_peer(
    c: &mut Control,
    change: PeerChange,
    routes: &mut Table<Arc<Peer>>,
    gone: &mut Vec<Arc<Peer>>,
    reset: &mut Vec<Arc<Peer>>,
    started: &mut Vec<Arc<Peer>>,
) -> Option<Arc<Peer>> {
    // A device is never its own peer.
    if c.identity.as_ref().is_some_and(|i| i.public == change.public) {
        return None;
    }
    if change.remove {
        if let Some(p) = c.peers.remove(&change.public) {
            drop_routes(&p, routes);
            gone.push(p);
        }
        return None;
    }
    let peer = match c.peers.get(&change.public) {
        Some(p) => p.clone(),
        None if change.update_only => return None,
        None => {
            let p = Peer::new(change.public);
            c.peers.insert(change.public, p.clone());
            p
        }
    };
    {
        let mut h = lock(&peer.handshake);
        if let Some(psk) = change.psk {
            h.psk = psk;
        }
        if let Some(cipher) = change.cipher {
            h.cipher_named = true;
            if h.cipher != cipher {
                h.cipher = cipher;
                reset.push(peer.clone());
            }
        }
    }
    if let Some(addr) = change.endpoint {
        let known = peer.endpoint.load().as_ref().is_some_and(|e| e.addr == addr);
        if !known {
            peer.endpoint.store(Some(Arc::new(Endpoint { addr, src: None })));
        }
    }
    if let Some(secs) = change.keepalive {
        let old = peer.timers.persistent_interval.swap(u32::from(secs), Relaxed);
        if secs == 0 {
            peer.timers.persistent_at.store(UNSET, Relaxed);
        } else if old == 0 {
            started.push(peer.clone());
        }
    }
    if change.replace_allowed {
        drop_routes(&peer, routes);
    }
    for (p, add) in change.allowed {
        if add {
            if let Some(old) = routes.insert(p, peer.clone()) {
                lock(&old.allowed).remove(&p);
            }
            lock(&peer.allowed).insert(p);
        } else if lock(&peer.allowed).remove(&p) {
            routes.remove(p);
        }
    }
    Some(peer)
}

fn put_hex(out: &mut String, name: &str, bytes: &[u8]) {
    out.push_str(name);
    out.push('=');
    for b in bytes {
        let _ = write!(out, "{b:02x}");
    }
    out.push('\n');
}

/// Flush the report to the client whenever it is this long.
const CHUNK: usize = 64 * 1024;

/// Writes the configuration of a running engine.
pub fn report(engine: &Engine, out: &mut impl Write) -> io::Result<()> {
    report_core(&engine.core, engine.port.load(Relaxed), engine.mark.load(Relaxed), out)
}

/// Writes the configuration, in chunks, holding the control lock only to list the peers.
pub fn report_core(core: &Core, port: u16, mark: u32, out: &mut impl Write) -> io::Result<()> {
    let mut s = Zeroizing::new(String::with_capacity(CHUNK + 4096));
    let peers: Vec<Arc<Peer>> = {
        let c = lock(&core.control);
        if let Some(i) = &c.identity {
            put_hex(&mut s, "private_key", i.secret.expose());
        }
        c.peers.values().cloned().collect()
    };
    if port != 0 {
        let _ = writeln!(s, "listen_port={port}");
    }
    if mark != 0 {
        let _ = writeln!(s, "fwmark={mark}");
    }
    for p in peers {
        if p.dead.load(Relaxed) {
            continue;
        }
        report_peer(&p, &mut s, out)?;
    }
    s.push_str("errno=0\n\n");
    out.write_all(s.as_bytes())
}

fn report_peer(p: &Peer, s: &mut String, out: &mut impl Write) -> io::Result<()> {
    flush_full(s, out)?;
    put_hex(s, "public_key", &p.public);
    {
        let h = lock(&p.handshake);
        put_hex(s, "preshared_key", &h.psk[..]);
        if h.cipher_named {
            let _ = writeln!(s, "retinue_cipher={}", h.cipher.name());
        }
    }
    s.push_str("protocol_version=1\n");
    if let Some(e) = p.endpoint.load().as_ref() {
        let _ = writeln!(s, "endpoint={}", e.addr);
    }
    let nanos = p.last_handshake.load(Relaxed);
    let _ = write!(
        s,
        "last_handshake_time_sec={}\nlast_handshake_time_nsec={}\ntx_bytes={}\nrx_bytes={}\npersistent_keepalive_interval={}\n",
        nanos / 1_000_000_000,
        nanos % 1_000_000_000,
        p.tx_bytes.load(Relaxed),
        p.rx_bytes.load(Relaxed),
        p.timers.persistent_interval.load(Relaxed),
    );
    // Copied first: a slow reader must not hold up a change.
    let allowed: Vec<Prefix> = lock(&p.allowed).iter().copied().collect();
    for a in allowed {
        let _ = writeln!(s, "allowed_ip={}/{}", a.addr(), a.len());
        flush_full(s, out)?;
    }
    Ok(())
}

/// Sends a full chunk on: the buffer never grows, which would leave keys in freed memory.
fn flush_full(s: &mut String, out: &mut impl Write) -> io::Result<()> {
    if s.len() > CHUNK {
        out.write_all(s.as_bytes())?;
        s.as_mut_str().zeroize();
        s.clear();
    }
    Ok(())
}
