//! Inner packet to datagram: route, cut, seal into one contiguous buffer, hand over for one send.

use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use crate::crypto::TAG_LEN;
use crate::device::{Action, Core};
use crate::noise::TYPE_DATA;
use crate::offload::{outbound, Segmenter, VnetHdr};
use crate::packet;
use crate::peer::{lock, Endpoint, Peer, Session};
use crate::router::Table;

/// Header of a data message: type, reserved, receiver index, counter.
pub const DATA_HEADER: usize = 16;
/// What a data message adds to its (padded) plaintext.
pub const OVERHEAD: usize = DATA_HEADER + TAG_LEN;
/// Bytes a packet buffer must have behind the packet, for padding.
pub const TAIL_ROOM: usize = 16;
/// Largest UDP payload over IPv4.
const MAX_SEND: usize = 65_507;
/// The kernel's limit of segments in one UDP_SEGMENT send (before 6.9).
pub const MAX_SEGMENTS: usize = 64;

/// How a send ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// Handed to the kernel, or dropped as a network may drop.
    Done,
    /// Our source address is gone: choose again.
    SourceGone,
}

/// Sends `data` as datagrams of `segment` bytes (the last may be shorter).
pub trait Transmit {
    fn transmit(&mut self, to: &Endpoint, data: &[u8], segment: usize) -> Sent;
}

/// Length of the plaintext after padding to 16, but not past the MTU.
pub fn padded(len: usize, mtu: usize) -> usize {
    let p = len.next_multiple_of(16);
    if p > mtu {
        len.max(mtu)
    } else {
        p
    }
}

/// One direction's state of one worker: the send buffer and caches valid within one batch.
pub struct Tx {
    out: Box<[u8]>,
    len: usize,
    segment: usize,
    count: usize,
    closed: bool,
    data: bool,
    session: Option<Arc<Session>>,
    segmenter: Segmenter,
    routes: Option<Arc<Table<Arc<Peer>>>>,
    route: Option<(IpAddr, Arc<Peer>)>,
    now: u64,
    mtu: usize,
}

impl Default for Tx {
    fn default() -> Self {
        Self {
            out: vec![0; MAX_SEND + 1].into_boxed_slice(),
            len: 0,
            segment: 0,
            count: 0,
            closed: false,
            data: false,
            session: None,
            segmenter: Segmenter::default(),
            routes: None,
            route: None,
            now: 0,
            mtu: 0,
        }
    }
}

impl Tx {
    /// Starts a batch: takes the route snapshot that holds for all of it.
    pub fn begin(&mut self, core: &Core, now: u64) {
        self.routes = Some(core.routes.load_full());
        self.now = now;
        self.mtu = core.mtu.load(Relaxed);
    }

    /// Ends a batch: sends what is left and lets go of the snapshot.
    pub fn end(&mut self, core: &Core, io: &mut impl Transmit) {
        self.flush(core, io);
        self.session = None;
        self.route = None;
        self.routes = None;
    }

    /// Takes one packet or superpacket from the TUN: `buf[..len]`, with [`TAIL_ROOM`] behind it.
    pub fn packet(
        &mut self,
        core: &Core,
        io: &mut impl Transmit,
        vnet: &VnetHdr,
        buf: &mut [u8],
        len: usize,
    ) {
        debug_assert!(buf.len() >= len + TAIL_ROOM);
        let Some(inner) = packet::parse(&buf[..len]) else { return };
        let len = inner.len;
        let Some(is_super) = outbound(vnet, &mut buf[..len], &mut self.segmenter) else { return };
        let known = matches!(&self.route, Some((d, _)) if *d == inner.dst);
        if !known {
            let Some(peer) = self.routes.as_ref().and_then(|r| r.lookup(inner.dst)) else { return };
            self.route = Some((inner.dst, peer.clone()));
        }
        let Some((_, peer)) = &self.route else { return };
        let same = self.session.as_ref().is_some_and(|s| Arc::ptr_eq(&s.peer, peer) && s.can_send(self.now));
        if !same {
            let peer = peer.clone();
            self.flush(core, io);
            self.session = peer.current.load_full().filter(|s| s.can_send(self.now));
            if self.session.is_none() {
                stage(core, &peer, if is_super { *vnet } else { VnetHdr::default() }, &buf[..len], self.now);
                return;
            }
        }
        self.seal(core, io, buf, len, is_super);
    }

    fn seal(&mut self, core: &Core, io: &mut impl Transmit, buf: &mut [u8], len: usize, is_super: bool) {
        // Taken out rather than cloned: no reference counting per packet.
        let Some(session) = self.session.take() else { return };
        self.seal_with(core, io, &session, buf, len, is_super);
        self.session = Some(session);
    }

    fn seal_with(
        &mut self,
        core: &Core,
        io: &mut impl Transmit,
        session: &Arc<Session>,
        buf: &mut [u8],
        len: usize,
        is_super: bool,
    ) {
        let count = if is_super { self.segmenter.count } else { 1 };
        let Some(first) = session.nonces(count as u64) else {
            core.want_handshake(&session.peer, self.now);
            return;
        };
        if is_super && self.count > 0 {
            // A superpacket spread over two sends would be two on the other side, too.
            let room = count * (padded(self.segmenter.len(0), self.mtu) + OVERHEAD);
            if self.len + room > MAX_SEND || self.count + count > MAX_SEGMENTS {
                self.send(core, io, session);
            }
        }
        for i in 0..count {
            let (start, len) =
                if is_super { (self.segmenter.prepare(i, buf), self.segmenter.len(i)) } else { (0, len) };
            self.append(core, io, session, first + i as u64, buf, start, len);
        }
    }

    #[allow(clippy::too_many_arguments)] // the inner loop: a struct would only rename them
    fn append(
        &mut self,
        core: &Core,
        io: &mut impl Transmit,
        session: &Arc<Session>,
        counter: u64,
        buf: &mut [u8],
        start: usize,
        len: usize,
    ) {
        let padded = padded(len, self.mtu);
        let need = padded + OVERHEAD;
        if need > MAX_SEND {
            return;
        }
        if self.count > 0
            && (self.closed
                || need > self.segment
                || self.count == MAX_SEGMENTS
                || self.len + need > MAX_SEND)
        {
            self.send(core, io, session);
        }
        // Padding may lie over the next segment's payload: put that back afterwards.
        let mut saved = [0u8; 16];
        let pad = padded - len;
        if pad > 0 {
            let tail = &mut buf[start + len..start + padded];
            saved[..pad].copy_from_slice(tail);
            tail.fill(0);
        }
        let out = &mut self.out[self.len..self.len + need];
        out[..4].copy_from_slice(&[TYPE_DATA, 0, 0, 0]);
        out[4..8].copy_from_slice(&session.remote_index.to_le_bytes());
        out[8..16].copy_from_slice(&counter.to_le_bytes());
        session.send.seal(counter, &[], &buf[start..start + padded], &mut out[DATA_HEADER..]);
        if pad > 0 {
            buf[start + len..start + padded].copy_from_slice(&saved[..pad]);
        }
        if self.count == 0 {
            self.segment = need;
        }
        self.closed = need < self.segment;
        self.len += need;
        self.count += 1;
        self.data |= len > 0;
    }

    fn flush(&mut self, core: &Core, io: &mut impl Transmit) {
        if let Some(session) = self.session.take() {
            self.send(core, io, &session);
            self.session = Some(session);
        }
    }

    /// Hands the buffer to the kernel and accounts for it.
    fn send(&mut self, core: &Core, io: &mut impl Transmit, session: &Arc<Session>) {
        if self.count == 0 {
            return;
        }
        let peer = &session.peer;
        let data = &self.out[..self.len];
        if let Some(to) = peer.endpoint.load_full() {
            if io.transmit(&to, data, self.segment) == Sent::SourceGone {
                peer.clear_source();
                io.transmit(&Endpoint { addr: to.addr, src: None }, data, self.segment);
            }
        }
        peer.tx_bytes.fetch_add(self.len as u64, Relaxed);
        core.touch_sent(session, self.now, self.data);
        self.len = 0;
        self.count = 0;
        self.closed = false;
        self.data = false;
    }

    /// Sends what waits for a session of `peer`; with nothing waiting a keepalive if asked for.
    /// Without a session it asks for one.
    pub fn release(
        &mut self,
        core: &Core,
        io: &mut impl Transmit,
        peer: &Arc<Peer>,
        keepalive: bool,
        now: u64,
    ) {
        self.begin(core, now);
        self.session = peer.current.load_full().filter(|s| s.can_send(now));
        if self.session.is_none() {
            if keepalive || !lock(&peer.staged).is_empty() {
                core.want_handshake(peer, now);
            }
        } else {
            let waiting = lock(&peer.staged).take();
            if waiting.is_empty() && keepalive {
                self.seal(core, io, &mut [], 0, false);
            }
            for mut p in waiting {
                let len = p.bytes.len();
                p.bytes.resize(len + TAIL_ROOM, 0);
                // The route is looked up again: the configuration may have changed meanwhile.
                self.packet(core, io, &p.vnet, &mut p.bytes, len);
            }
        }
        self.end(core, io);
    }
}

/// Carries out what the core asked for.
pub fn execute(core: &Core, actions: &mut Vec<Action>, tx: &mut Tx, io: &mut impl Transmit, now: u64) {
    for a in actions.drain(..) {
        match a {
            Action::ToPeer(peer, m) => {
                let Some(to) = peer.endpoint.load_full() else { continue };
                let b = m.bytes();
                if io.transmit(&to, b, b.len()) == Sent::SourceGone {
                    peer.clear_source();
                    io.transmit(&Endpoint { addr: to.addr, src: None }, b, b.len());
                }
                peer.tx_bytes.fetch_add(b.len() as u64, Relaxed);
            }
            Action::Answer(peer, to, m) => {
                io.transmit(&to, m.bytes(), m.bytes().len());
                peer.tx_bytes.fetch_add(m.bytes().len() as u64, Relaxed);
            }
            Action::ToAddress(to, m) => {
                io.transmit(&to, m.bytes(), m.bytes().len());
            }
            Action::Flush(peer, keepalive) => tx.release(core, io, &peer, keepalive, now),
        }
    }
}

fn stage(core: &Core, peer: &Arc<Peer>, vnet: VnetHdr, packet: &[u8], now: u64) {
    if peer.dead.load(Relaxed) {
        return;
    }
    lock(&peer.staged).push(vnet, packet);
    if peer.current.load().as_ref().is_some_and(|s| s.can_send(now)) {
        // The session came up between the look and the push.
        core.queue.push(crate::events::Event::Flush(peer.clone()));
    } else {
        core.want_handshake(peer, now);
    }
}

#[cfg(test)]
mod tests {
    use super::padded;

    #[test]
    fn padding_table() {
        for (len, mtu, want) in [
            (0, 1420, 0),
            (1, 1420, 16),
            (16, 1420, 16),
            (17, 1420, 32),
            (1408, 1420, 1408),
            (1409, 1420, 1420),
            (1420, 1420, 1420),
            (1421, 1420, 1421),
            (9000, 1420, 9000),
            (10, 0, 10),
        ] {
            assert_eq!(padded(len, mtu), want, "{len} {mtu}");
        }
    }
}
