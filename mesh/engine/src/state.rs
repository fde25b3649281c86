//! The whole state of a core as bytes, for the engine that takes over from this one.
//!
//! Pure: no descriptors, no clock. Times are of the boot clock, which both processes share. Whoever reads trusts
//! nothing: every length, flag and number is checked, and a fault yields no core at all.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use zeroize::{Zeroize, Zeroizing};

use crate::cookie::mac1_key;
use crate::crypto::{blank_secret, Aead, Cipher, Key, Secret, SecretKey};
use crate::device::{Core, Identity, Slot};
use crate::events::{Event, Queue};
use crate::noise::{Initiation, TransportKeys};
use crate::offload::{VnetHdr, VNET_LEN};
use crate::peer::{lock, Endpoint, Keypairs, Peer, Session};
use crate::replay::Replay;
use crate::router::{Prefix, Table};
use crate::timers::REJECT_AFTER_MESSAGES;

/// Nonces left out between the two processes. None would be enough, as the old one stands still; and the gap stays
/// far below the replay window, so that what is still under way is not taken for too old.
const NONCE_GAP: u64 = 64;
const MAX_PEERS: usize = 1 << 16;
const MAX_STAGED: usize = 128;
const MAX_PACKET: usize = 65_535;

/// The bytes are no state of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

type Read<T> = Result<T, Malformed>;

/// Grows by copying and wiping: a plain reallocation would leave keys in freed memory.
#[derive(Default)]
pub struct Writer(Zeroizing<Vec<u8>>);

impl Writer {
    pub fn bytes(&mut self, b: &[u8]) {
        if self.0.capacity() - self.0.len() < b.len() {
            let room = (self.0.capacity() * 2).max(self.0.len() + b.len()).max(64 * 1024);
            let mut bigger = Zeroizing::new(Vec::with_capacity(room));
            bigger.extend_from_slice(&self.0);
            self.0.zeroize();
            self.0 = bigger;
        }
        self.0.extend_from_slice(b);
    }

    pub fn flag(&mut self, v: bool) {
        self.bytes(&[u8::from(v)]);
    }

    pub fn u32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }

    pub fn u64(&mut self, v: u64) {
        self.bytes(&v.to_le_bytes());
    }

    fn option<T>(&mut self, v: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.flag(v.is_some());
        if let Some(v) = v {
            write(self, v);
        }
    }

    fn cipher(&mut self, c: Cipher) {
        self.flag(c == Cipher::Aes256Gcm);
    }

    fn ip(&mut self, ip: IpAddr) {
        self.flag(ip.is_ipv6());
        match ip {
            IpAddr::V4(a) => self.bytes(&a.octets()),
            IpAddr::V6(a) => self.bytes(&a.octets()),
        }
    }

    pub fn finish(self) -> Zeroizing<Vec<u8>> {
        self.0
    }
}

pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(b: &'a [u8]) -> Self {
        Self(b)
    }

    fn take(&mut self, n: usize) -> Read<&'a [u8]> {
        let (piece, rest) = self.0.split_at_checked(n).ok_or(Malformed)?;
        self.0 = rest;
        Ok(piece)
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    fn secret(&mut self) -> Read<Secret> {
        let mut s = blank_secret();
        s.copy_from_slice(self.take(32)?);
        Ok(s)
    }

    pub fn flag(&mut self) -> Read<bool> {
        match self.take(1)? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Malformed),
        }
    }

    pub fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things that takes at least `each` bytes a piece.
    fn count(&mut self, most: usize, each: usize) -> Read<usize> {
        let n = self.u32()? as usize;
        (n <= most && n.saturating_mul(each) <= self.0.len()).then_some(n).ok_or(Malformed)
    }

    fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Read<T>) -> Read<Option<T>> {
        self.flag()?.then(|| read(self)).transpose()
    }

    fn cipher(&mut self) -> Read<Cipher> {
        Ok(if self.flag()? { Cipher::Aes256Gcm } else { Cipher::ChaCha20Poly1305 })
    }

    fn ip(&mut self) -> Read<IpAddr> {
        Ok(if self.flag()? { self.array::<16>()?.into() } else { self.array::<4>()?.into() })
    }

    pub fn end(&self) -> Read<()> {
        self.0.is_empty().then_some(()).ok_or(Malformed)
    }
}

/// Writes everything a core knows. Nothing else may use it meanwhile, and its event queue must be worked off.
pub fn save(core: &Core, w: &mut Writer) {
    let c = lock(&core.control);
    w.u32(core.mtu.load(Relaxed) as u32);
    w.u64(c.under_load_until);
    w.option(c.identity.as_ref(), |w, i| {
        w.bytes(i.secret.expose());
        w.bytes(&i.checker.secret[..]);
        w.option(i.checker.secret_born, Writer::u64);
    });
    w.u32(c.peers.len() as u32);
    for p in c.peers.values() {
        save_peer(p, w);
    }
}

fn save_peer(p: &Peer, w: &mut Writer) {
    w.bytes(&p.public);
    {
        let h = lock(&p.handshake);
        w.bytes(&h.psk[..]);
        w.cipher(h.cipher);
        w.flag(h.cipher_named);
        w.option(h.pending.as_ref(), |w, i| {
            w.bytes(&i.chain[..]);
            w.bytes(&i.hash);
            w.bytes(i.ephemeral.expose());
            w.u32(i.local_index);
        });
        w.bytes(&h.stamps.present);
        w.bytes(&h.stamps.ahead);
        w.option(h.last_initiation, Writer::u64);
        w.option(h.cookies.last_mac1, |w, m| w.bytes(&m));
        w.option(h.cookies.cookie.as_ref(), |w, c| {
            w.u64(c.0);
            w.bytes(&c.1);
        });
    }
    w.option(p.endpoint.load_full(), |w, e| {
        w.ip(e.addr.ip());
        w.u32(e.addr.port().into());
        w.u32(if let SocketAddr::V6(a) = e.addr { a.scope_id() } else { 0 });
        w.option(e.src, Writer::ip);
    });
    for n in [&p.rx_bytes, &p.tx_bytes, &p.last_handshake] {
        w.u64(n.load(Relaxed));
    }
    let t = &p.timers;
    for at in
        [&t.keepalive_at, &t.silence_at, &t.retransmit_at, &t.zero_at, &t.persistent_at, &t.initiated_at]
    {
        w.u64(at.load(Relaxed));
    }
    w.flag(t.another_keepalive.load(Relaxed));
    w.flag(t.late_rekey_sent.load(Relaxed));
    w.u32(t.persistent_interval.load(Relaxed));
    w.u32(t.attempts.load(Relaxed));
    let k = lock(&p.keys);
    for s in [&k.previous, &k.current, &k.next] {
        w.option(s.as_ref().filter(|s| !s.dead.load(Relaxed)), |w, s| save_session(s, w));
    }
    let allowed = lock(&p.allowed);
    w.u32(allowed.len() as u32);
    for a in allowed.iter() {
        w.ip(a.addr());
        w.u32(a.len().into());
    }
    let staged = lock(&p.staged);
    w.u32(staged.iter().len() as u32);
    for s in staged.iter() {
        w.bytes(&s.vnet.bytes());
        w.u32(s.bytes.len() as u32);
        w.bytes(&s.bytes);
    }
}

fn save_session(s: &Session, w: &mut Writer) {
    w.u32(s.local_index);
    w.u32(s.remote_index);
    for a in [&s.send, &s.recv] {
        let (cipher, key) = a.made_of().expect("a session's AEAD knows its key");
        w.cipher(cipher);
        w.bytes(key);
    }
    w.flag(s.initiator);
    w.u64(s.born);
    w.u64(s.sent().next_multiple_of(NONCE_GAP).saturating_add(NONCE_GAP).min(REJECT_AFTER_MESSAGES));
    w.flag(s.confirmed.load(Relaxed));
    for word in lock(&s.replay).words() {
        w.u64(word);
    }
}

/// Makes a core of what [`save`] wrote. `queue` becomes its event queue.
pub fn load(r: &mut Reader, now: u64, queue: Queue) -> Read<Core> {
    let mtu = r.u32()?;
    if !(68..=65_535).contains(&mtu) {
        return Err(Malformed);
    }
    let core = Core::new(now, queue, mtu as usize);
    let mut routes = Table::default();
    let mut indices = HashSet::new();
    {
        let mut c = lock(&core.control);
        c.under_load_until = r.u64()?;
        c.identity = r.option(|r| {
            let mut i = Identity::new(SecretKey::from_bytes(**r.secret()?));
            i.checker.secret.copy_from_slice(r.take(32)?);
            // A birth ahead of the clock would be subtracted from it.
            i.checker.secret_born = r.option(Reader::u64)?.map(|born| born.min(now));
            Ok(i)
        })?;
        core.mac1_key.store(c.identity.as_ref().map(|i| Arc::new(mac1_key(&i.public))));
        let peers = r.count(MAX_PEERS, 200)?;
        for _ in 0..peers {
            let p = load_peer(r, now, &core, &mut routes, &mut indices)?;
            if c.identity.as_ref().is_some_and(|i| i.public == p.public) {
                return Err(Malformed);
            }
            if let Some(at) = p.timers.next() {
                p.timers.arm(at);
                c.wheel.insert(at, p.clone());
            }
            if !lock(&p.staged).is_empty() {
                core.queue.push(Event::Flush(p.clone()));
            }
            if c.peers.insert(p.public, p).is_some() {
                return Err(Malformed);
            }
        }
    }
    core.routes.store(Arc::new(routes));
    Ok(core)
}

fn load_peer(
    r: &mut Reader,
    now: u64,
    core: &Core,
    routes: &mut Table<Arc<Peer>>,
    indices: &mut HashSet<u32>,
) -> Read<Arc<Peer>> {
    let peer = Peer::new(r.array::<32>()?);
    {
        let mut h = lock(&peer.handshake);
        h.psk = r.secret()?;
        h.cipher = r.cipher()?;
        h.cipher_named = r.flag()?;
        h.pending = r.option(|r| {
            Ok(Box::new(Initiation {
                chain: Zeroizing::new(**r.secret()?),
                hash: r.array()?,
                ephemeral: SecretKey::from_bytes(**r.secret()?),
                local_index: r.u32()?,
            }))
        })?;
        if let Some(i) = &h.pending {
            if !indices.insert(i.local_index) {
                return Err(Malformed);
            }
            core.set_slot(i.local_index, Slot::Handshake(peer.clone()));
        }
        h.stamps.present = r.array()?;
        h.stamps.ahead = r.array()?;
        h.last_initiation = r.option(Reader::u64)?;
        h.cookies.last_mac1 = r.option(Reader::array)?;
        h.cookies.cookie = r.option(|r| Ok(Box::new((r.u64()?.min(now), r.array()?))))?;
    }
    let endpoint = r.option(|r| {
        let ip = r.ip()?;
        let port = u16::try_from(r.u32()?).map_err(|_| Malformed)?;
        let scope = r.u32()?;
        let addr = match ip {
            IpAddr::V4(a) => SocketAddrV4::new(a, port).into(),
            IpAddr::V6(a) => SocketAddrV6::new(a, port, 0, scope).into(),
        };
        Ok(Arc::new(Endpoint { addr, src: r.option(Reader::ip)? }))
    })?;
    peer.endpoint.store(endpoint);
    for n in [&peer.rx_bytes, &peer.tx_bytes, &peer.last_handshake] {
        n.store(r.u64()?, Relaxed);
    }
    let t = &peer.timers;
    for at in
        [&t.keepalive_at, &t.silence_at, &t.retransmit_at, &t.zero_at, &t.persistent_at, &t.initiated_at]
    {
        at.store(r.u64()?, Relaxed);
    }
    t.another_keepalive.store(r.flag()?, Relaxed);
    t.late_rekey_sent.store(r.flag()?, Relaxed);
    t.persistent_interval.store(r.u32()?.min(u16::MAX.into()), Relaxed);
    t.attempts.store(r.u32()?, Relaxed);
    {
        let mut k = lock(&peer.keys);
        let Keypairs { previous, current, next } = &mut *k;
        for place in [previous, current, next] {
            *place = r.option(|r| load_session(r, &peer))?;
            if let Some(s) = place {
                if !indices.insert(s.local_index) {
                    return Err(Malformed);
                }
                core.set_slot(s.local_index, Slot::Session(s.clone()));
            }
        }
        peer.current.store(k.current.clone());
    }
    for _ in 0..r.count(usize::MAX, 9)? {
        let ip = r.ip()?;
        let len = u8::try_from(r.u32()?).map_err(|_| Malformed)?;
        let prefix = Prefix::new(ip, len).ok_or(Malformed)?;
        // Each prefix has one owner.
        if routes.insert(prefix, peer.clone()).is_some() {
            return Err(Malformed);
        }
        lock(&peer.allowed).insert(prefix);
    }
    for _ in 0..r.count(MAX_STAGED, VNET_LEN + 4)? {
        let vnet = VnetHdr::read(r.take(VNET_LEN)?);
        let len = r.count(MAX_PACKET, 1)?;
        lock(&peer.staged).push(vnet, r.take(len)?);
    }
    Ok(peer)
}

fn load_session(r: &mut Reader, peer: &Arc<Peer>) -> Read<Arc<Session>> {
    let (local, remote) = (r.u32()?, r.u32()?);
    let mut aead = || -> Read<Aead> {
        let cipher = r.cipher()?;
        let key: Secret = r.secret()?;
        Ok(Aead::new(cipher, &key as &Key))
    };
    let keys = TransportKeys { send: aead()?, recv: aead()? };
    let (initiator, born, sent, confirmed) = (r.flag()?, r.u64()?, r.u64()?, r.flag()?);
    if sent > REJECT_AFTER_MESSAGES {
        return Err(Malformed);
    }
    let replay = Replay::from_words(|| r.u64().ok()).ok_or(Malformed)?;
    Ok(Session::new(peer.clone(), local, remote, keys, initiator, born).restored(sent, replay, confirmed))
}
